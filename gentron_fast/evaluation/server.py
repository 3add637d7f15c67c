"""The page of a study and the few addresses that it calls, by Bottle on waitress."""

from importlib.resources import files

from gentron_fast.evaluation.study import MEDIA_NAME, Study
from gentron_fast.evaluation.votes import ANSWERS
from gentron_fast.web import LOOPBACK, POLICY, address, bears, bind, is_loopback

try:
    import bottle
    import waitress
except ImportError as error:
    raise ImportError('a study is served by bottle: pip install "gentron_fast[study]"') from error

LONGEST = 64  # characters of a rater's name and of a vote's id


def application(study: Study, token: str | None) -> bottle.Bottle:
    """The WSGI application. Where there is a token, all but the bare page asks for it.

    The page has it from its own address, behind the #, which browsers send to no one.
    """
    app, votes = bottle.Bottle(), study.votes()
    page = files("gentron_fast.evaluation").joinpath("page.html").read_bytes()
    media = {name for pair in study.pairs for name in pair.media}
    known = {pair.id for pair in study.pairs}

    def refuse(status: int, message: str):
        raise bottle.HTTPResponse({"error": message}, status)

    @app.hook("before_request")
    def check_host() -> None:
        host = bottle.request.get_header("Host", "")
        if not token and not is_loopback(host):
            refuse(403, f"this study is served to {', '.join(LOOPBACK)}, not to {host}")

    def check_token() -> None:
        if token and not bears(bottle.request.get_header("Authorization", ""), token):
            refuse(403, "this study is open to those who have its whole address, with the token")

    def field(values, name: str) -> str:
        value = values.get(name) if hasattr(values, "get") else None
        if not isinstance(value, str) or not 0 < len(value.strip()) <= LONGEST:
            refuse(400, f"{name} must be text of 1 to {LONGEST} characters")
        try:
            value.encode()
        except UnicodeEncodeError:
            refuse(400, f"{name} must be text that is UTF-8")
        return value.strip()

    def progress(rater: str) -> dict:
        """Which pairs a rater has judged, and the id of the vote that undo would take back."""
        given = votes.standing(rater)
        return {"done": [vote.pair for vote in given], "last": given[-1].id if given else None}

    def side(pair, is_right: bool) -> str:
        return f"media/{pair.media[pair.left ^ is_right]}"

    @app.get("/")
    def show_page():
        bottle.response.content_type = "text/html; charset=utf-8"
        bottle.response.set_header("Content-Security-Policy", POLICY)
        bottle.response.set_header("Cache-Control", "no-cache")
        return page

    @app.get("/study")
    def show_study():
        check_token()
        rater = field(bottle.request.query.decode(), "rater")
        bottle.response.set_header("Cache-Control", "no-store")
        pairs = [
            {"id": p.id, "prompt": p.prompt, "left": side(p, False), "right": side(p, True)}
            for p in study.order(rater)
        ]
        return {"pairs": pairs, **progress(rater)}

    @app.get("/media/<name>")
    def show_media(name):
        check_token()
        if name not in media:
            refuse(404, "no such file in this study")
        return bottle.static_file(name, root=str((study.folder / MEDIA_NAME).absolute()))

    @app.post("/vote")
    def take_vote():
        check_token()
        values = bottle.request.json
        vote_id, rater, pair, quality, text = (
            field(values, name) for name in ("id", "rater", "pair", "quality", "text")
        )
        if pair not in known:
            refuse(400, "this study has no such pair")
        if quality not in ANSWERS or text not in ANSWERS:
            refuse(400, f"quality and text must each be one of {', '.join(ANSWERS)}")
        votes.add(vote_id, rater, pair, quality, text)
        return progress(rater)

    @app.post("/undo")
    def take_back():
        check_token()
        rater = field(bottle.request.json, "rater")
        votes.undo(field(bottle.request.json, "id"), rater)
        return progress(rater)

    return app


def serve_study(study: Study, host: str, port: int, token: str | None) -> None:
    """Serve a study until Ctrl-C. ValueError where the address cannot be had."""
    app, listening = application(study, token), bind(host, port)
    server = waitress.create_server(
        app, sockets=[listening], threads=8, max_request_body_size=2**16
    )
    print(f"study        {len(study.pairs)} pairs, votes in {study.votes().path}")
    print(f"open         {address(host, listening, token)}", flush=True)
    server.run()
