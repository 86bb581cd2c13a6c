"""Which machine a benchmark ran on: a ratio of one CPU is not another's, and each table says which it is."""

import os
import sys
from datetime import date

import torch


def machine() -> dict[str, str | int | float]:
    """CPU, vector instructions, cores that this process may use, their load at the start, torch and the date."""
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()
    return {
        "cpu": str(capabilities.get("cpu_name", "an unknown CPU")),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        "load": round(os.getloadavg()[0], 1),
        "torch": torch.__version__,
        "date": date.today().isoformat(),
    }


def show_machine() -> dict[str, str | int | float]:
    """Prints the line above a table; returns what goes into its JSON."""
    found = machine()
    print(
        f"{found['cpu']}, {found['instructions']}, {found['cores']} cores, load {found['load']}; "
        f"torch {found['torch']}; {found['date']}",
        flush=True,
    )
    return found
