"""Before a model is loaded: is everything installed, and is the port free? After it: serve until a signal comes."""

import socket

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.import_utils import is_serve_available

from losa.system.signals import Interrupted

GRACE = 20  # seconds for answers that are under way when a signal comes; schedulers kill after 30


def check_installed() -> None:
    """Raises ValueError where the packages of `losa[serve]` are missing."""
    if not is_serve_available():
        raise ValueError('serving needs fastapi, uvicorn and openai: pip install ".[serve]" in a clone of losa')


def listen(host: str, port: int) -> socket.socket:
    """A socket that takes connections from now on; they wait until `serve` answers.

    Args:
        port: 0 for any that is free.

    Raises:
        ValueError: the address is nobody's, or taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ValueError(f"cannot listen on {host}, port {port}: {error}; choose another --host or --port") from error


def serve(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, listening: socket.socket) -> None:
    """Answers requests for `name` until SIGTERM or SIGINT; answers that are under way then have `GRACE` seconds."""
    import uvicorn

    from losa.serving.app import build

    app, batches = build(model, tokenizer, name)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE))
    try:
        server.run(sockets=[listening])
    except Interrupted:  # uvicorn sends itself the signal again once it has ended
        if not server.started:
            raise
    finally:
        batches.stop()
