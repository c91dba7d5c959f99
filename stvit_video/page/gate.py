"""What stands between the page's visitors and gradio."""

import asyncio
import contextlib
import json
import secrets
import shutil
import time
from pathlib import Path

from gradio.route_utils import upload_fn
from gradio.routes import file_upload_statuses
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

# What the page uses of gradio's interface. Of the rest, "file=" would give out files, "proxy=" fetch pages.
USED = {"upload", "upload_progress", "queue", "heartbeat", "startup-events", "cancel", "reset"}
MB = 1 << 20  # as gradio counts
LARGEST_MESSAGE = 1 << 16  # bytes, of what is no upload
SLOWEST = 600  # seconds, of an upload
WAITING_UPLOADS, KEPT_SECONDS = 32, 3600  # then an upload that nobody asked about is removed


class Gate:
    """Stands before gradio, and refuses what would cost memory, disk or a connection before it does.

    Large bodies, and those of unknown size; parts of gradio that the page does not use; names of files that
    were not uploaded, which gradio would copy or, from the net, fetch. Each upload gets a
    folder to itself: gradio goes by content, and one visitor's would be removed with another's equal one.
    """

    def __init__(self, app, folder: Path, largest: int):
        self.app, self.folder, self.largest = app, folder, largest

    async def __call__(self, scope, receive, send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        request = Request(scope, receive)
        path = scope["path"]  # request.url has it from the header Host, which may say anything
        _, interface, rest = path.partition("/gradio_api/")
        part = rest.partition("/")[0]
        response = self._refusal(request, part, bool(interface))
        if response is None and part == "upload":
            response = await self._upload(request)
        elif response is None and request.method == "POST":
            body = await request.body()
            messages = [{"type": "http.request", "body": body}]
            try:
                json.loads(body or "null", object_hook=self._check)
            except (ValueError, RecursionError):
                response = PlainTextResponse("not a message of this page", 400)

            async def receive(receive=receive):
                return messages.pop() if messages else await receive()

        await (response or self.app)(scope, receive, send)

    def _refusal(self, request: Request, part: str, of_interface: bool) -> Response | None:
        if of_interface and part not in USED:
            return PlainTextResponse("not given out here", 403)
        if request.method in ("GET", "HEAD", "OPTIONS"):
            return None
        size = request.headers.get("content-length")
        most = self.largest if part == "upload" else LARGEST_MESSAGE
        if size is None or not size.isdecimal() or "transfer-encoding" in request.headers:
            return PlainTextResponse("a body of unknown size", 411)
        if int(size) > most + LARGEST_MESSAGE:
            return PlainTextResponse(f"{int(size) / MB:.0f} MB, at most {most / MB:g} MB are taken", 413)
        return None

    def _check(self, entry: dict) -> dict:
        if "path" in entry:
            path = Path(str(entry["path"])).resolve().relative_to(self.folder)  # else a ValueError
            if len(path.parts) < 2:
                raise ValueError(path)
        return entry

    async def _upload(self, request: Request) -> Response:
        homes = list(self.folder.iterdir())
        for home in homes:
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                if time.time() - home.stat().st_mtime > KEPT_SECONDS:
                    shutil.rmtree(home, ignore_errors=True)
        if len(homes) >= WAITING_UPLOADS:
            return PlainTextResponse(f"{WAITING_UPLOADS} uploads are waiting, try again later", 503)
        home, number = self.folder / secrets.token_hex(8), request.query_params.get("upload_id")
        progress = file_upload_statuses if number else None
        try:
            async with asyncio.timeout(SLOWEST):
                files, *_ = await upload_fn(request, home, self.largest, number, upload_progress=progress)
        except BaseException as error:
            shutil.rmtree(home, ignore_errors=True)
            if isinstance(error, Exception):
                return PlainTextResponse(f"not an upload: {str(error) or type(error).__name__}", 400)
            raise
        request.app.get_blocks().upload_file_set.update(map(str, files))  # gradio too removes it then
        return JSONResponse([str(file) for file in files])
