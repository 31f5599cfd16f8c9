"""TensorBoard: a fit as event files, written by torch.utils.tensorboard."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minikeras.errors import check_positive_int, describe, is_number
from minikeras.integrations.tracking import Tracker, as_dict, import_optional

EVENTS = "torch.utils.tensorboard"
HPARAMS = "tensorboard.plugins.hparams"
# a file next to the events, which contains the number of the last epoch's last batch
BATCHES = "minikeras_batches.txt"


def _as_tensors(graph: Any) -> tuple[Tensor, ...]:
    """Return the arguments of forward as a tuple of tensors."""
    example = tuple(graph) if isinstance(graph, (tuple, list)) else (graph,)
    if not all(isinstance(part, Tensor) for part in example):
        raise TypeError(
            f"graph must be a tensor or a tuple of them, got {describe(graph)}. "
            f"Pass features, X[:1]."
        )
    return example


def _plain_hparams(hparams: dict[str, Any]) -> dict[str, Any]:
    """Return the values as the table takes them.

    Others are refused at once, and not when the fit has ended.
    """
    plain = {}
    for name, value in hparams.items():
        if not isinstance(value, str) and not is_number(value):
            raise ValueError(
                f"hparams has {describe(value)} under {name!r}; expected a number, a string or a "
                f"bool. Pass it as a string, str(...)."
            )
        plain[name] = value.item() if hasattr(value, "item") else value
    return plain


PACKAGE = (EVENTS, "TensorBoard", "tensorboard")  # as for import_optional


class TensorBoard(Tracker):
    """Write each epoch's row of the history, and the learning rates, for TensorBoard.

    The tags are the history's columns ("loss", "val_loss", "lr"), the steps are the epochs. List
    this callback after those that add to the logs, such as LRScheduler. Several processes write one
    run, from rank 0.

    A resumed fit continues in its folder, without the points after the last save. A new run in the
    folder of an earlier run replaces its points: give each run its own folder to compare them.

    Args:
        log_dir: the folder; it is created. `tensorboard --logdir` shows it.
        every: also write the running means every this many batches, default none. They are the run
            "steps" in the folder of that name, under the same tags; the steps are the batches since
            the run began. Reading them waits for the device. The learning rates there are those at
            the moment when this callback is called.
        histograms: at the end of each epoch, write a histogram of the finite values of each
            parameter, under "weights/" and its name; default False.
        graph: an example batch as forward takes it, a tensor or a tuple of tensors, to draw the
            model; it is run once, in eval mode. Drawing uses torch.jit.trace, which does not take
            every model. Default none.
        hparams: name -> number, string or bool, for the table of the HPARAMS tab, which also shows
            the history's columns and whether the fit succeeded. Default no such table.

    Raises:
        ModuleNotFoundError: the package is missing: pip install tensorboard.
        ValueError: `every` is not a whole number of 1 or more, or one of `hparams` is something
            else; at the first epoch, a graph that cannot be drawn.
        TypeError: `hparams` is not a dict, or `graph` not tensors.

    >>> import minikeras, tempfile
    >>> from minikeras.integrations.tensorboard import TensorBoard
    >>> from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    >>> model = minikeras.Model(torch.nn.Linear(1, 1))
    >>> model.compile(torch.nn.MSELoss())
    >>> data = torch.zeros(8, 1), torch.ones(8, 1)
    >>> board = TensorBoard(
    ...     tempfile.mkdtemp(), histograms=True, graph=data[0], hparams={"lr": 0.001}
    ... )
    >>> dfhistory = model.fit(2, data, callbacks=[board], verbose=0)
    >>> [point.step for point in EventAccumulator(str(board.folder)).Reload().Scalars("loss")]
    [1, 2]
    """

    opened = ("writers",)

    def __init__(
        self,
        log_dir: str | Path,
        every: int | None = None,
        histograms: bool = False,
        graph: Any = None,
        hparams: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        import_optional(*PACKAGE)
        self.folder = Path(log_dir)
        self.every = None if every is None else check_positive_int("every", every)
        self.histograms = histograms
        self.graph = None if graph is None else _as_tensors(graph)
        self.hparams = None if hparams is None else _plain_hparams(as_dict("hparams", hparams))
        self.start_new_run()

    @property
    def package(self) -> Any:
        """The package; not an attribute, since no copy can hold it."""
        return import_optional(*PACKAGE)

    def start_new_run(self) -> None:
        super().start_new_run()
        self.step = 0  # batches since the run began
        self.steps_before = 0  # batches of the epochs before the current one

    def open(self, epoch: int) -> None:
        batches = self.folder / BATCHES
        if self.run_id is None and epoch > 1 and batches.exists():  # the fit of another callback
            self.step = int(batches.read_text())
            self.steps_before = self.step
        self.run_id = str(self.folder)
        self.columns: list[str] = []  # of the last epoch that was written, for the hparams
        self._wait_for_new_file_name()
        self.writers = [self.package.SummaryWriter(self.folder, purge_step=epoch)]
        if self.every is not None:
            self.writers.append(
                self.package.SummaryWriter(self.folder / "steps", purge_step=self.step + 1)
            )
        self.is_open = True  # set here already, since the graph may fail
        if self.graph is not None:
            self._draw_graph()

    def _wait_for_new_file_name(self) -> None:
        """Wait until no event file has the current second in its name.

        The files are read in the order of their names, in which the tenth file of a second comes
        before the ninth.
        """
        while any(self.folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(1 - time.time() % 1)

    def _single_file_writer(self, suffix: str) -> Any:
        """Return a writer for what a run has only one of; an earlier file is deleted."""
        for file in self.folder.glob(f"events.*{suffix}"):
            file.unlink()
        return self.package.SummaryWriter(self.folder, filename_suffix=suffix)

    def _draw_graph(self) -> None:
        """Draw the graph; the model's mode and the random state are restored afterwards."""
        model = self.model
        parameters = list(model.parameters())
        if any(hasattr(parameter, "full_tensor") for parameter in parameters):
            raise ValueError(
                "TensorBoard cannot draw the graph of parameters in parts. Leave graph out."
            )
        device = parameters[0].device if parameters else torch.device("cpu")
        example = tuple(part.to(device) for part in self.graph or ())
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with (
                torch.random.fork_rng(devices=[]),
                torch.no_grad(),
                self._single_file_writer(".graph") as writer,
                warnings.catch_warnings(),
            ):
                # torch draws by torch.jit.trace, whose warnings do not matter for a drawing
                warnings.simplefilter("ignore")
                self._trace(writer, example)
        finally:
            for module, mode in modes:
                module.training = mode

    def _trace(self, writer: Any, example: tuple[Tensor, ...]) -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # torch also prints the error
                writer.add_graph(self.model, example)
        except Exception as error:
            raise ValueError(
                f"TensorBoard cannot draw the model with graph={describe(example)}: "
                f"{str(error).splitlines()[0]}. "
                f"Pass features as forward takes them, such as X[:1], or leave graph out."
            ) from error

    def on_fit_begin(self) -> None:
        super().on_fit_begin()
        # an interrupted epoch begins again, unless a checkpoint restores its position
        self.step = self.steps_before

    def on_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        last = self.step
        self.step = self.steps_before + batch
        if not self.is_open or self.every is None:
            return
        if self.step // self.every > last // self.every:
            for name, value in self.values(logs).items():
                self.writers[1].add_scalar(name, value, self.step)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self.steps_before = self.step
        self.weights: dict[str, Tensor] = {}
        if self.histograms:
            self.weights = self._finite_weights()  # on all processes
        super().on_epoch_end(epoch, logs)

    def _finite_weights(self) -> dict[str, Tensor]:
        weights = {}
        for name, parameter in self.model.named_parameters():
            whole: Tensor = parameter
            if hasattr(parameter, "full_tensor"):
                whole = parameter.full_tensor()
            if whole.is_floating_point():
                weights[name] = whole.detach().float()[whole.isfinite()]
        return weights

    def write(self, epoch: int, values: dict[str, float]) -> None:
        writer = self.writers[0]
        for name, value in values.items():
            writer.add_scalar(name, value, epoch)
        for name, weight in self.weights.items():
            if weight.numel():
                writer.add_histogram(f"weights/{name}", weight, epoch)
        self.columns = list(values)
        self._flush()

    def _flush(self) -> None:
        if self.is_open:
            for writer in self.writers:
                writer.flush()

    def close(self, error: BaseException | None) -> None:
        for writer in self.writers:
            writer.close()
        (self.folder / BATCHES).write_text(str(self.steps_before))
        if self.hparams is not None and self.columns:
            self._write_hparams("STATUS_SUCCESS" if error is None else "STATUS_FAILURE")

    def _write_hparams(self, status: str) -> None:
        """Write the session for the HPARAMS tab; its metrics are the scalars of this folder."""
        summaries = import_optional(f"{EVENTS}.summary", "TensorBoard", "tensorboard")
        api = import_optional(f"{HPARAMS}.api_pb2", "TensorBoard", "tensorboard")
        data = import_optional(f"{HPARAMS}.plugin_data_pb2", "TensorBoard", "tensorboard")
        metrics = dict.fromkeys(self.columns, 0.0)
        experiment, start, end = summaries.hparams(self.hparams, metrics)
        plugin_data = end.value[0].metadata.plugin_data  # torch always writes success
        content = data.HParamsPluginData.FromString(plugin_data.content)
        content.session_end_info.status = api.Status.Value(status)
        plugin_data.content = content.SerializeToString()
        with self._single_file_writer(".hparams") as writer:
            for summary in (experiment, start, end):
                writer.file_writer.add_summary(summary)

    def state_dict(self) -> dict[str, Any]:
        self._flush()  # what the state counts as logged must be in the files
        return super().state_dict() | {"step": self.step, "before": self.steps_before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.step = state["step"]
        self.steps_before = state["before"]
