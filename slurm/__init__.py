"""Where jobs run. Submitit's lines about its own work are left out of logs and terminals, unless one asks for them."""

import os

os.environ.setdefault("SUBMITIT_LOG_LEVEL", "WARNING")  # jobs inherit it
