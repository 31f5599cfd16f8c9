"""TensorBoard: a fit as event files, written by torch.utils.tensorboard."""

from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minikeras.errors import described, is_number, positive_int
from minikeras.integrations.tracking import Tracker, as_dict, imported

EVENTS = "torch.utils.tensorboard"
HPARAMS = "tensorboard.plugins.hparams"
BATCHES = "minikeras_batches.txt"  # a file beside the events, with the number of the last epoch's last batch in it


@contextlib.contextmanager
def _as_torch_does() -> Iterator[None]:
    """torch's add_graph goes by torch.jit.trace; what torch warns of in that is nothing to a drawing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _tensors(graph: Any) -> tuple[Tensor, ...]:
    """The arguments of forward."""
    example = tuple(graph) if isinstance(graph, (tuple, list)) else (graph,)
    if not all(isinstance(part, Tensor) for part in example):
        raise TypeError(
            f"graph must be a tensor or a tuple of them, got {described(graph)}. Pass features, X[:1]."
        )
    return example


def _shown_by_hparams(hparams: dict[str, Any]) -> dict[str, Any]:
    """The values that the table takes; what is no such value is said now, and not when the fit has ended."""
    for name, value in hparams.items():
        if not isinstance(value, str) and not is_number(value):
            raise ValueError(
                f"hparams has {described(value)} under {name!r}; expected a number, a string or a bool. Pass it as a "
                f"string, str(...)."
            )
    return {
        name: value.item() if hasattr(value, "item") else value for name, value in hparams.items()
    }


class TensorBoard(Tracker):
    """Writes each epoch's row of the history, and the learning rates, for TensorBoard.

    The tags are the history's columns ("loss", "val_loss", "lr"), over the epochs' numbers. List this callback after
    those that add to the logs, such as LRScheduler. Several processes are one run, written by rank 0.

    A fit that is carried on goes on in its folder, without the points after the last save. A run that begins anew in
    the folder of another takes the place of its points: give each run a folder of its own to see them side by side.

    Args:
        log_dir: the folder; it is made. `tensorboard --logdir` shows it.
        every: batches between two points of the running means, default none; they are the run "steps" in the folder of
            that name, under the same tags, over the number of the batch since the run began. Reading them waits for the
            device. The rates there are those that hold when this callback is called.
        histograms: at each epoch's end, of each parameter's finite values, under "weights/" and its name; default none.
        graph: an example batch of what forward takes, a tensor or a tuple of them, to draw the model with; it is run
            once, in eval mode. By torch.jit.trace, which does not take every model. Default none.
        hparams: name -> number, string or bool, for the table of the HPARAMS tab, which has the history's columns
            beside them, and whether the fit succeeded. Default no such table.

    Raises:
        ModuleNotFoundError: the package is missing: pip install tensorboard.
        ValueError: `every` is no whole number of 1 or more, or one of `hparams` is something else; at the first epoch,
            a graph that cannot be drawn.
        TypeError: `hparams` is no dict, or `graph` no tensors.

    >>> import minikeras, tempfile
    >>> from minikeras.integrations.tensorboard import TensorBoard
    >>> from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    >>> model = minikeras.Model(torch.nn.Linear(1, 1))
    >>> model.compile(torch.nn.MSELoss())
    >>> board = TensorBoard(tempfile.mkdtemp(), histograms=True, graph=torch.zeros(1, 1), hparams={"lr": 0.001})
    >>> dfhistory = model.fit(2, (torch.zeros(8, 1), torch.ones(8, 1)), callbacks=[board], verbose=0)
    >>> [point.step for point in EventAccumulator(str(board.folder)).Reload().Scalars("loss")]
    [1, 2]
    """

    def __init__(
        self,
        log_dir: str | Path,
        every: int | None = None,
        histograms: bool = False,
        graph: Any = None,
        hparams: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.package = imported(EVENTS, "TensorBoard", "tensorboard")
        self.folder = Path(log_dir)
        self.every = None if every is None else positive_int("every", every)
        self.histograms = histograms
        self.graph = None if graph is None else _tensors(graph)
        self.hparams = None if hparams is None else _shown_by_hparams(as_dict("hparams", hparams))
        self.anew()

    def anew(self) -> None:
        super().anew()
        self.step = 0  # batches, since the run began
        self.before = 0  # of them, those of the epochs before this one

    def open(self, epoch: int) -> None:
        if (
            self.run_id is None and epoch > 1 and (self.folder / BATCHES).exists()
        ):  # of another callback's fit
            self.step = self.before = int((self.folder / BATCHES).read_text())
        self.run_id = str(self.folder)
        self.columns: list[str] = []  # of the first epoch here, for the table of hparams
        self._wait()
        self.writers = [self.package.SummaryWriter(self.folder, purge_step=epoch)]
        if self.every is not None:
            self.writers.append(
                self.package.SummaryWriter(self.folder / "steps", purge_step=self.step + 1)
            )
        self.opened = True  # now already: the graph may fail
        if self.graph is not None:
            self._draw()

    def _wait(self) -> None:
        """Until the second after the last file's: they are read by name, in which a second's tenth comes before its
        ninth."""
        while any(self.folder.glob(f"events.out.tfevents.{int(time.time()):010d}.*")):
            time.sleep(1 - time.time() % 1)

    def _own_file(self, suffix: str) -> Any:
        """A writer for what there is one of in a run; an earlier one goes."""
        for file in self.folder.glob(f"events.*{suffix}"):
            file.unlink()
        return self.package.SummaryWriter(self.folder, filename_suffix=suffix)

    def _draw(self) -> None:
        """The graph, without a trace on the model: its mode and the random state are as they were."""
        model, parameters = self.model, list(self.model.parameters())
        if any(hasattr(parameter, "full_tensor") for parameter in parameters):
            raise ValueError(
                "TensorBoard cannot draw the graph of parameters in parts. Leave graph out."
            )
        device = parameters[0].device if parameters else torch.device("cpu")
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with (
                torch.random.fork_rng(devices=[]),
                torch.no_grad(),
                self._own_file(".graph") as writer,
                _as_torch_does(),
            ):
                self._trace(writer, tuple(part.to(device) for part in self.graph or ()))
        finally:
            for module, mode in modes:
                module.training = mode

    def _trace(self, writer: Any, example: tuple[Tensor, ...]) -> None:
        try:
            with contextlib.redirect_stdout(io.StringIO()):  # torch prints the error too
                writer.add_graph(self.model, example)
        except Exception as error:
            raise ValueError(
                f"TensorBoard cannot draw the model with graph={described(example)}: {str(error).splitlines()[0]}. "
                f"Pass features as forward takes them, such as X[:1], or leave graph out."
            ) from error

    def on_fit_begin(self) -> None:
        super().on_fit_begin()
        self.step = (
            self.before
        )  # an epoch that was broken off begins anew, unless a checkpoint says where it stands

    def on_batch_end(self, batch: int, logs: Mapping[str, float]) -> None:
        last, self.step = self.step, self.before + batch
        if self.opened and self.every is not None and self.step // self.every > last // self.every:
            for name, value in self.values(logs).items():
                self.writers[1].add_scalar(name, value, self.step)

    def on_epoch_end(self, epoch: int, logs: dict[str, float]) -> None:
        self.before = self.step
        self.weights = dict(self._weights()) if self.histograms else {}  # by all processes
        super().on_epoch_end(epoch, logs)

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            whole: Tensor = (
                parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
            )
            if whole.is_floating_point():
                yield name, whole.detach().float()[whole.isfinite()]

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
        for writer in self.writers if self.opened else ():
            writer.flush()

    def close(self, error: BaseException | None) -> None:
        for writer in self.writers:
            writer.close()
        (self.folder / BATCHES).write_text(str(self.before))
        if self.hparams is not None and self.columns:
            self._write_hparams("STATUS_SUCCESS" if error is None else "STATUS_FAILURE")

    def _write_hparams(self, status: str) -> None:
        """The session as the HPARAMS tab wants it; its metrics are the scalars of this folder."""
        summaries = imported(f"{EVENTS}.summary", "TensorBoard", "tensorboard")
        api = imported(f"{HPARAMS}.api_pb2", "TensorBoard", "tensorboard")
        data = imported(f"{HPARAMS}.plugin_data_pb2", "TensorBoard", "tensorboard")
        experiment, start, end = summaries.hparams(self.hparams, dict.fromkeys(self.columns, 0.0))
        held = end.value[0].metadata.plugin_data  # torch says success whatever happened
        content = data.HParamsPluginData.FromString(held.content)
        content.session_end_info.status = api.Status.Value(status)
        held.content = content.SerializeToString()
        with self._own_file(".hparams") as writer:
            for summary in (experiment, start, end):
                writer.file_writer.add_summary(summary)

    def state_dict(self) -> dict[str, Any]:
        self._flush()  # what the state says was logged is in the files
        return super().state_dict() | {"step": self.step, "before": self.before}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.step, self.before = state["step"], state["before"]
