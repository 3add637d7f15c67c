"""The addresses of the server, as OpenAI's interface has them, by FastAPI."""

import asyncio
import base64
import contextlib
import json
import math
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Literal

from fastapi import Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from gentron_fast.media import encode_image
from gentron_fast.serving import QueueFull, SchedulerClosed
from gentron_fast.serving.fields import WrongField, read_form_fields, read_json_fields
from gentron_fast.serving.service import FAULT, Service, told
from gentron_fast.web import LOOPBACK, POLICY, bears, is_loopback

BODY_SECONDS = 30  # in which a body must be here
SWEEP_SECONDS = 60  # between two looks for what is too old
NO_TOKENS = dict.fromkeys(("input_tokens", "output_tokens", "total_tokens"), 0)
NO_TOKENS["input_tokens_details"] = dict.fromkeys(("image_tokens", "text_tokens"), 0)
KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refused(Exception):
    """A request that gets an error: its status, one line, and the field or a code that it has."""

    def __init__(self, status: int, message: str, field=None, code=None, headers=None):
        super().__init__(message)
        self.status, self.field, self.code, self.headers = status, field, code, headers


def application(service: Service, token: str | None) -> FastAPI:
    """The ASGI application. Where there is a token, all but the page, /health and an image's own
    address asks for it."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI):
        sweeping = asyncio.create_task(_sweep(service))
        yield
        sweeping.cancel()

    app = FastAPI(title="gentron_fast", openapi_url=None, redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(Guard, service=service)
    page = files("gentron_fast.serving").joinpath("page.html").read_bytes()

    def check_origin(request: Request) -> None:
        """Without a token only this machine's own pages may ask; and no page of another server,
        which a browser lets post a form, though not read the answer."""
        host = request.headers.get("host", "")
        if not token and not is_loopback(host):
            raise Refused(403, f"this server is for {', '.join(LOOPBACK)}, not {host[:64]!r}")
        origin = request.headers.get("origin")
        if not token and origin and origin.partition("://")[2] != host:
            raise Refused(403, f"pages of {origin[:64]!r} may not ask this server")

    def check_token(request: Request) -> None:
        if token and not bears(request.headers.get("authorization", ""), token):
            headers = {"WWW-Authenticate": "Bearer"}
            message = "a key is needed, as Authorization: Bearer KEY"
            raise Refused(401, message, code="invalid_api_key", headers=headers)

    open_to_all = [Depends(check_origin)]
    guarded = [Depends(check_origin), Depends(check_token)]

    async def read_fields(request: Request) -> dict:
        """The fields of a body, JSON or a form."""
        form = ("multipart/form-data", "application/x-www-form-urlencoded")
        if request.headers.get("content-type", "").startswith(form):
            values = read_form_fields(dict(await request.form(max_files=1, max_fields=64)))
        else:
            values = read_json_fields(await request.body())
        if values.get("input_reference"):
            raise WrongField("input_reference", "input_reference: no clip starts from a picture")
        return values

    def found(record: dict | None, clip_id: str) -> dict:
        if record is None:
            raise Refused(404, f"there is no video {clip_id[:64]!r}", "video_id", "not_found")
        return record

    @app.get("/", dependencies=open_to_all)
    def show_page():
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-cache"}
        return Response(page, media_type="text/html; charset=utf-8", headers=headers)

    @app.get("/health", dependencies=open_to_all)
    def show_health():
        stopping = "stopping" if service.is_stopping else "ok"
        status = "broken" if service.is_broken else stopping
        return JSONResponse({"status": status}, 200 if status == "ok" else 503)

    @app.get("/metrics", dependencies=guarded)
    def show_metrics():
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models", dependencies=guarded)
    def list_models():
        return {"object": "list", "data": [service.about_model()]}

    @app.get("/v1/models/{name:path}", dependencies=guarded)
    def show_model(name: str):
        if name != service.model.name:
            raise Refused(404, f"there is no model {name[:64]!r}, only {service.model.name}")
        return service.about_model()

    @app.post("/v1/videos", dependencies=guarded)
    def make_video(values: Annotated[dict, Depends(read_fields)]):
        return service.make_video(values)

    @app.get("/v1/videos", dependencies=guarded)
    def list_videos(
        after: str | None = None,
        limit: Annotated[int, Query(ge=1, le=100)] = 20,
        order: Literal["asc", "desc"] = "desc",
    ):
        try:
            records, more = service.videos(after, limit, order == "desc")
        except KeyError:
            raise Refused(400, f"there is no video {after[:64]!r}", "after") from None
        ends = [records[index]["id"] if records else None for index in (0, -1)]
        return {
            "object": "list",
            "data": records,
            "first_id": ends[0],
            "last_id": ends[1],
            "has_more": more,
        }

    @app.get("/v1/videos/{clip_id}", dependencies=guarded)
    def show_video(clip_id: str):
        return found(service.video(clip_id), clip_id)

    @app.delete("/v1/videos/{clip_id}", dependencies=guarded)
    def remove_video(clip_id: str):
        found(service.video(clip_id), clip_id)
        service.remove(clip_id)
        return {"id": clip_id, "object": "video.deleted", "deleted": True}

    @app.get("/v1/videos/{clip_id}/content", dependencies=guarded)
    def send_video(clip_id: str, variant: Literal["video", "thumbnail", "spritesheet"] = "video"):
        record = found(service.video(clip_id), clip_id)
        if record["status"] != "completed":
            why = (
                record["error"]["message"] if record["error"] else "ask again when it is completed"
            )
            raise Refused(404, f"the video is {record['status']}: {why}", code="not_completed")
        try:
            if variant == "video":
                return _file(service.store.path(clip_id), "video/mp4")
            data, kind = service.picture(clip_id, sheet=variant == "spritesheet")
        except FileNotFoundError:  # removed since its record was read
            return found(None, clip_id)
        return Response(data, media_type=kind)

    @app.post("/v1/images/generations", dependencies=guarded)
    async def make_images(request: Request, values: Annotated[dict, Depends(read_fields)]):
        loop, ended = asyncio.get_running_loop(), asyncio.Event()
        done = partial(loop.call_soon_threadsafe, ended.set)
        wanted, jobs = await run_in_threadpool(service.make_images, values, done)
        try:
            while any(job.state in ("queued", "running") for job in jobs):
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(ended.wait(), 1)
                ended.clear()
                if await request.is_disconnected():
                    return Response(status_code=499)  # nobody reads it
        finally:
            for job in jobs:
                job.cancel()  # nothing where it is done
        return await run_in_threadpool(send_images, request, wanted, jobs)

    def send_images(request: Request, wanted, jobs) -> dict | Response:
        form, data = wanted.form, []
        for job, asked in zip(jobs, wanted.requests(), strict=True):
            try:
                frame = job.result(0)[0]
            except Exception as error:
                service.log(f"an image of seed {asked.seed}", error)
                raise _failed(error) from error
            picture = encode_image(frame, form["output_format"], form["output_compression"])
            if form["response_format"] == "url" and not form["stream"]:
                name = service.store.add_image(picture, form["output_format"])
                sent = {"url": f"{request.base_url}v1/images/{name}"}
            else:
                sent = {"b64_json": base64.b64encode(picture).decode()}
            data.append(sent | {"seed": asked.seed})
        service.metrics.took("image", max(job.completed_at - job.created_at for job in jobs))
        about = {
            "output_format": form["output_format"],
            "size": wanted.settings["size"],
            "model": service.model.name,
            "settings": wanted.settings,
            "warnings": jobs[0].warnings,
        }
        made = int(max(job.completed_at for job in jobs))
        if not form["stream"]:
            return {"created": made, "data": data, **about}
        about |= {"created_at": made, "background": "opaque", "quality": "auto", "usage": NO_TOKENS}
        events = [{"type": "image_generation.completed", **image, **about} for image in data]
        lines = (f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
        return Response("".join(lines), media_type="text/event-stream")

    @app.get("/v1/images/{name}", dependencies=open_to_all)
    def send_image(name: str):
        with contextlib.suppress(FileNotFoundError):
            if path := service.store.image(name):
                return _file(path, f"image/{path.suffix[1:]}")
        raise Refused(404, f"there is no image {name[:64]!r}", "name", "not_found")

    for kind in (Refused, WrongField, QueueFull, SchedulerClosed, RequestValidationError):
        app.add_exception_handler(kind, _answer)
    app.add_exception_handler(HTTPException, _answer)
    app.add_exception_handler(ClientDisconnect, lambda *_: Response(status_code=499))
    app.add_exception_handler(Exception, _answer)
    return app


class Guard:
    """Around all of the application: no body is larger, or slower, than the limits have it; no
    answer is taken for something else or kept by a proxy; and answers are counted."""

    def __init__(self, app, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        limit, size, is_whole = self.service.limits.body, 0, False
        until = asyncio.get_running_loop().time() + BODY_SECONDS

        async def receive_a_part():
            nonlocal size, is_whole
            if is_whole:
                return await receive()
            try:
                async with asyncio.timeout_at(until):
                    message = await receive()
            except TimeoutError:
                raise Refused(408, f"the body took more than {BODY_SECONDS} seconds") from None
            size += len(message.get("body", b""))
            is_whole = not message.get("more_body", False)
            if size > limit:
                raise Refused(413, f"the body is larger than {limit} bytes")
            return message

        async def send_with_headers(message):
            if message["type"] == "http.response.start":
                self.service.metrics.answered(message["status"])
                names = {name for name, _ in message["headers"]}
                message["headers"].append((b"x-content-type-options", b"nosniff"))
                if b"cache-control" not in names:
                    message["headers"].append((b"cache-control", b"no-store"))
            await send(message)

        try:
            await self.app(scope, receive_a_part, send_with_headers)
        except Exception:  # told and answered further out
            self.service.metrics.answered(500)
            raise


async def _sweep(service: Service) -> None:
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        await run_in_threadpool(service.sweep)


def _answer(request: Request, error: Exception) -> JSONResponse:
    """An error as OpenAI's clients read it: one line of JSON."""
    refused = _refused(request, error)
    status = refused.status
    told = {
        "message": " ".join(str(refused).split()),
        "type": KINDS.get(status, "invalid_request_error" if status < 500 else "server_error"),
        "param": refused.field,
        "code": refused.code,
    }
    return JSONResponse({"error": told}, status, refused.headers)


def _refused(request: Request, error: Exception) -> Refused:
    match error:
        case Refused():
            return error
        case WrongField(name="model"):
            return Refused(404, str(error), "model", "model_not_found")
        case WrongField():
            return Refused(400, str(error), error.name)
        case RequestValidationError():
            first = error.errors()[0]
            name, given = str(first["loc"][-1]), str(first.get("input"))[:64]
            return Refused(400, f"{name} is {given!r}: {first['msg']}", name)
        case QueueFull():
            headers = {"Retry-After": str(max(math.ceil(error.retry_after), 1))}
            return Refused(429, str(error), code="queue_full", headers=headers)
        case SchedulerClosed():
            return _failed(error)
        case HTTPException():
            asked = f"{request.method} {request.url.path[:64]}"
            return Refused(error.status_code, f"{error.detail}: {asked}", headers=error.headers)
    return Refused(500, FAULT)


def _failed(error: Exception) -> Refused:
    """What is answered where the images asked for could not be made."""
    code, message = told(error)
    if code == "server_stopped":
        return Refused(503, message, code=code, headers={"Retry-After": "10"})
    # OpenAI's clients ask again after a 5xx unless they are told not to.
    status = 504 if code == "deadline_passed" else 500
    return Refused(status, message, code=code, headers={"X-Should-Retry": "false"})


def _file(path: Path, kind: str) -> FileResponse:
    """A file. FileNotFoundError where it is not there, rather than in the middle of the answer."""
    return FileResponse(path, media_type=kind, stat_result=path.stat())
