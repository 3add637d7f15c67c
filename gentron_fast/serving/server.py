"""The HTTP server, uvicorn, and how it ends: what was begun is finished, or handed back, first."""

import uvicorn

from gentron_fast.serving.service import Service

MOST_CONNECTIONS = 500  # then 503
DOWNLOAD_SECONDS = 5  # that answers on their way get once all work has ended


class Server(uvicorn.Server):
    """Serves an application until SIGTERM or SIGINT, and then until its service has stopped.

    Within `grace` seconds of the signal, and the one step that then runs, every clip is finished or
    told as failed; meanwhile clients may ask for what is there, and get 503 for anything new. A
    second signal ends the grace. It ends too where the scheduler has ended by itself, of a fault.
    """

    def __init__(self, app, service: Service, grace: float):
        super().__init__(
            uvicorn.Config(
                app,
                http="h11",
                ws="none",
                loop="asyncio",
                log_config=None,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_graceful_shutdown=DOWNLOAD_SECONDS,
                server_header=False,
            )
        )
        self.service, self.grace = service, grace
        self._signals = 0  # not yet answered

    def handle_exit(self, sig, frame) -> None:
        self._signals += 1

    async def on_tick(self, counter: int) -> bool:
        while self._signals:
            self._signals -= 1
            self.service.stop(0 if self.service.is_stopping else self.grace)
        if self.service.is_broken and not self.service.is_stopping:
            self.service.stop(0)
        return await super().on_tick(counter) or self.service.is_stopped
