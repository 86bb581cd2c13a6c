"""One rank of a supervisor (`common.elastic`), as a process.

Its work comes as a line of JSON on standard input, whose other end closes when the supervisor dies. Its outcome is a
file; without one it has died, or lost another rank.
"""

import importlib
import json
import os
import sys
import threading
import traceback
from pathlib import Path
from typing import NoReturn

from common.errors import Interrupted, UserError, has_lost_a_rank

OUTCOME = "FPDM_OUTCOME"  # the variable that names the file
LONGEST = 4000  # characters of a traceback that are told


def main() -> None:
    from common.loading import parse_recipe

    work = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_supervisor, daemon=True).start()
    function = getattr(importlib.import_module(work["module"]), work["function"])
    outcome = {}
    try:
        function(parse_recipe(work["recipe"]), **work["arguments"])
    except UserError as error:
        outcome = {"error": str(error)}
    except Interrupted as interruption:
        outcome = {"interrupted": str(interruption)}
    except Exception as error:
        if has_lost_a_rank(error):
            raise
        traceback.print_exc()
        outcome = {"failed": traceback.format_exc()[-LONGEST:]}
    path = Path(os.environ[OUTCOME])
    path.with_suffix(".new").write_text(json.dumps(outcome))
    path.with_suffix(".new").replace(path)


def _end_with_supervisor() -> NoReturn:
    os.read(0, 1)
    os._exit(1)


if __name__ == "__main__":
    main()
