# PYTHON_ARGCOMPLETE_OK
"""Opens the playground: a page on this machine that draws one image in two ways of sampling, side by side.

  python pipeline/play.py                       # the network that comes with this project
  python pipeline/play.py runs/demo/pipeline    # one of your own, as pipeline/export.py wrote it

`make play` installs what it needs beside the pipeline's packages. It listens on 127.0.0.1, which no other machine
reaches. Ctrl-C ends it.
"""

import importlib.util
import socket
import sys
import time
from pathlib import Path
from threading import Thread

from common.command import Parser, exit_status_of, path_argument
from common.errors import UserError

SHIPPED = Path(__file__).parents[1] / "assets" / "demo"


def main() -> None:
    began = time.monotonic()
    parser = Parser(__doc__)
    parser.add_argument(
        "export",
        nargs="?",
        type=path_argument,
        default=SHIPPED,
        metavar="EXPORT",
        help="a folder of pipeline/export.py",
    )
    parser.add_argument("--port", type=int, default=8080, help="of the page (8080)")
    parser.add_argument("--no-browser", action="store_true", help="open none; the address is printed anyway")
    arguments = parser.parse_args()
    if not 1 <= arguments.port <= 65535:
        raise UserError(f"--port: {arguments.port} is outside 1..65535")
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", arguments.port))
        except OSError as error:
            raise UserError(f"--port: {arguments.port}: {error.strerror}; name another") from None
    if importlib.util.find_spec("nicegui") is None:
        raise UserError("nicegui is not installed here; run make play, or pip install -e '.[play]'")
    if not (arguments.export / "model_index.json").exists():
        raise UserError(
            f"{arguments.export}: has no model_index.json; name a folder that python pipeline/export.py wrote, such as "
            "runs/demo/pipeline"
        )

    from diffusers.utils import logging

    from pipeline.playground.page import serve
    from pipeline.playground.player import Player

    logging.set_verbosity_error()  # diffusers misses accelerate, which is of no use here
    logging.disable_progress_bar()
    player = Player(arguments.export)
    address = f"http://127.0.0.1:{arguments.port}"

    def announce() -> None:  # once it answers, which is after it has started
        while not answers(arguments.port):
            time.sleep(0.05)
        print(f"playground: {address} after {time.monotonic() - began:.0f} s; Ctrl-C ends it", flush=True)

    Thread(target=announce, daemon=True).start()
    serve(player, f"{arguments.export}: one image, two ways", arguments.port, not arguments.no_browser)


def answers(port: int) -> bool:
    """Whether something on this machine listens there."""
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


if __name__ == "__main__":
    sys.exit(exit_status_of(main))
