"""The playground's page: two panels, each with settings of its own, an image that sharpens, and its residuals."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from nicegui import ui

from common.errors import one_line
from pipeline.playground.player import Player, Progress
from pipeline.reporting.contact_sheet import png_uri

REFRESH_SECONDS = 0.1
STEPS = (2, 5, 10, 20, 50)
ITERATIONS = (1, 2, 3, 5, 8, 16, 26)
LEAST_RESIDUAL = 1e-7  # float32's


class Stopped(Exception):
    """The settings changed: this image is no longer wanted."""


class Panel:
    """One way of sampling, and the image that it gives."""

    def __init__(self, page: "Page", title: str, **chosen: Any) -> None:
        settings = page.player.settings
        self.page, self.version = page, 0
        self.latest: Progress | str | None = None  # drawn by the worker: progress, or why there is none
        self.shown: Progress | str | None = None
        self.chosen: dict[str, Any] = {
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
        }
        if page.player.network.kind == "fpdm":
            starts = {"reuse": bool(settings.reuse), "start_extrapolation": settings.start_extrapolation}
            self.chosen |= {"iterations": 5, "iterate_guidance": 0.0} | starts | chosen
        with ui.card().classes("w-96 max-w-full gap-1"):
            ui.label(title).classes("text-lg")
            self.image = ui.interactive_image().classes("w-full").style("image-rendering: pixelated; aspect-ratio: 1")
            self.said = ui.label("...").classes("text-sm")
            self.error = ui.label().classes("text-sm text-negative")
            if "iterations" in self.chosen:
                ui.label("relative residual by iteration, at this timestep").classes("text-sm")
                self.chart = ui.echart(residual_chart()).classes("w-full h-40")
            self._controls()
        ui.timer(REFRESH_SECONDS, self.refresh)

    def _controls(self) -> None:
        self._choose("num_inference_steps", "timesteps", STEPS)
        if "iterations" in self.chosen:
            self._choose("iterations", "iterations a timestep", ITERATIONS)
            switch = ui.switch("start at the last timestep's solution").bind_value(self.chosen, "reuse")
            switch.on_value_change(self.draw)
            self._slide("start_extrapolation", "move that start on by this part of its last change", 0, 1)
            self._slide("iterate_guidance", "guidance by the first iterate", 0, 2)
        self._slide("guidance_scale", "guidance scale (1: none)", 1, 5)

    def _choose(self, name: str, label: str, values: Sequence[int]) -> None:
        ui.label(label).classes("text-sm")
        toggle = ui.toggle(sorted({*values, self.chosen[name]})).props("dense unelevated")
        toggle.bind_value(self.chosen, name).on_value_change(self.draw)

    def _slide(self, name: str, label: str, low: float, high: float) -> None:
        with ui.row().classes("w-full items-center no-wrap"):
            ui.label(label).classes("text-sm w-1/2")
            slider = ui.slider(min=low, max=high, step=0.1).props("label")
            slider.bind_value(self.chosen, name).on("change", self.draw)

    def draw(self) -> None:
        """Begins anew, with the settings as they are now."""
        self.version += 1
        given = dict(self.chosen)
        if not given.get("reuse", True):
            given["start_extrapolation"] = 0.0  # moves starts that reuse gives
        self.page.worker.submit(self._work, given, self.version)

    def _work(self, given: dict[str, Any], version: int) -> None:
        def show(progress: Progress) -> None:
            if version != self.version:
                raise Stopped
            self.latest = progress

        if version != self.version:
            return
        try:
            self.page.player.draw(self.page.label, int(self.page.seed or 0), given, show)
        except Stopped:
            pass
        except ValueError as error:
            self.latest = one_line(str(error), 300)
        except Exception as error:  # noqa: BLE001 # nobody else would see it
            self.latest = one_line(f"{type(error).__name__}: {error}", 300)

    def refresh(self) -> None:
        """Shows what the worker has drawn since."""
        if self.latest is self.shown:
            return
        self.shown = latest = self.latest
        self.error.text = latest if isinstance(latest, str) else ""
        if not isinstance(latest, Progress):
            return
        self.image.set_source(png_uri(latest.image))
        self.said.text = (
            f"step {latest.step} of {latest.steps}, timestep {latest.timestep:.0f}: {latest.blocks:,} blocks"
        )
        if latest.residuals:
            self.chart.options["xAxis"]["data"] = list(range(1, len(latest.residuals) + 1))
            self.chart.options["series"][0]["data"] = [max(value, LEAST_RESIDUAL) for value in latest.residuals]
            self.chart.update()


class Page:
    """Of one visitor."""

    def __init__(self, player: Player, worker: ThreadPoolExecutor, title: str) -> None:
        self.player, self.worker = player, worker
        self.label, self.seed = 0, 0
        ui.label(title).classes("text-xl")
        with ui.row().classes("items-center"):
            names = player.class_names
            ui.select(names, label="class").classes("w-48").bind_value(self, "label").on_value_change(self.draw)
            ui.number("seed", min=0, step=1, precision=0).bind_value(self, "seed").on_value_change(self.draw)
        with ui.row():
            self.panels = [Panel(self, "one way", iterations=1), Panel(self, "another", iterations=8)]
        self.draw()

    def draw(self) -> None:
        """Begins both images anew."""
        for panel in self.panels:
            panel.draw()


def residual_chart() -> dict[str, Any]:
    """An empty chart on a logarithmic scale."""
    return {
        "animation": False,
        "grid": {"left": 48, "right": 12, "top": 8, "bottom": 24},
        "xAxis": {"type": "category", "data": []},
        "yAxis": {"type": "log", "min": LEAST_RESIDUAL, "max": 1},
        "series": [{"type": "line", "data": []}],
    }


def serve(player: Player, title: str, port: int, browser: bool) -> None:
    """Until Ctrl-C. On the loopback interface only: whoever reaches the page uses this machine's devices."""
    from nicegui import app

    worker = ThreadPoolExecutor(1)  # an image at a time: all draw on the same cores or the same device

    @ui.page("/")
    def page() -> None:
        Page(player, worker, title)

    app.on_shutdown(lambda: worker.shutdown(wait=False, cancel_futures=True))
    options: dict[str, Any] = {"reload": False, "show_welcome_message": False, "dark": None}
    ui.run(host="127.0.0.1", port=port, show=browser, title=title, **options)
