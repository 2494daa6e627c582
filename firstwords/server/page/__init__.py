"""The page: three files and an icon of our own, nothing from anywhere else.

The browser keeps the conversations, the server keeps nothing. What people and models write becomes text
nodes alone; beside the script's own care the Content-Security-Policy (`guard`) forbids what could act.
"""

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

FILES = {
    "/": ("page.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
}

router = APIRouter()


def _serve(path: str, name: str, kind: str) -> None:
    content = (files(__package__) / name).read_bytes()
    router.get(path)(lambda: Response(content, media_type=kind))


for _path, (_name, _kind) in FILES.items():
    _serve(_path, _name, _kind)
