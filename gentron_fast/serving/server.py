"""The HTTP server, uvicorn, and how it ends: what was begun is finished, or handed back, first."""

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gentron_fast.serving.service import Service

MOST_CONNECTIONS = 500  # then 503
HEAD_SECONDS = 30  # in which a request's head must be here
DOWNLOAD_SECONDS = 5  # that answers on their way get once all work has ended


class Protocol(H11Protocol):
    """A connection that is closed where no whole head of a request comes in HEAD_SECONDS: uvicorn
    itself waits for the first one, and for the rest of one that has begun, for ever."""

    _closing = None

    def connection_made(self, transport) -> None:
        super().connection_made(transport)
        self._wait_for_a_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._wait_for_a_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop_waiting()

    def _wait_for_a_head(self) -> None:
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()
        elif self._closing is None:
            self._closing = self.loop.call_later(HEAD_SECONDS, self.transport.close)

    def _stop_waiting(self) -> None:
        if self._closing:
            self._closing.cancel()
            self._closing = None


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
                http=Protocol,
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
