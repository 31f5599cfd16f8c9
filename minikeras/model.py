"""`Model`: an nn.Module with Keras's verbs. Read `train_step` first, then loop.py for what calls it.

compile     loss, optimizer, metrics and device, held in one object beside the module (`_run`)
fit         loop.fit: epochs of train_step over batches, validation, history
evaluate    loop.evaluate: evaluate_step over batches
predict     prediction.predict: outputs of every row
save, load  the weights
export      a program that runs without its code
summary     a table of the layers

What compile and fit are asked for is put together in assemble.py, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minikeras import assemble, loop, prediction
from minikeras.batch import call_with
from minikeras.callback import Callback
from minikeras.compiled_names import hide_compiled_names
from minikeras.errors import NotCompiledError, one_of
from minikeras.exported import is_exported, set_mode
from minikeras.nests import detached
from minikeras.phase import NoChecks
from minikeras.results import Result, scalar_loss
from minikeras.rows import UnknownRows
from minikeras.run import Run, prepare

if TYPE_CHECKING:
    from minikeras.report.layer_summary import Summary


class Model(nn.Module):
    """A module that can be compiled, fitted, evaluated and asked to predict. Subclass it, or wrap a network.

    Losses and metrics are called with (y_pred, y_true), as torch's are and unlike TensorFlow's.

    Args:
        net: a network to wrap, then found as `model.net`; leave it out in a subclass that has its own `forward`.

    >>> import minikeras
    >>> from torch import nn
    >>> _ = torch.manual_seed(0)
    >>> x = torch.linspace(-1, 1, 64).reshape(-1, 1)
    >>> model = minikeras.Model(nn.Linear(1, 1))
    >>> model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.5), device="cpu")
    >>> dfhistory = model.fit(20, (x, 3 * x + 1), verbose=0)
    >>> model.evaluate((x, 3 * x + 1))["val_loss"] < 1e-6  # of {"val_loss": ...}
    True
    >>> round(model.predict(torch.tensor([[2.0]])).item(), 3)
    7.0
    """

    _run: Run | None = (
        None  # at class level: a missing attribute inside an nn.Module is reported as the wrong one
    )
    optimizer: Any  # the optimizer or dict of optimizers, from compile on
    history: Any  # the DataFrame that fit returns, from compile on; as of the last fit that ended
    stop_training: bool = False  # set it to True in a callback: the fit ends after that batch

    @assemble.explained_constructor
    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        if net is not None:
            self.net: nn.Module = assemble.checked_network(net)
        hide_compiled_names(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The wrapped network's outputs; a subclass writes its own, or this is a NotImplementedError."""
        if not hasattr(self, "net"):
            raise NotImplementedError(
                f"{type(self).__name__} has no forward. Write it, or wrap a network: Model(net)."
            )
        return self.net(*args, **kwargs)

    def train(self, mode: bool = True) -> Model:
        """Set train mode (or eval mode, with `mode` False), as nn.Module does; an exported program keeps its own."""
        if any(is_exported(module) for module in self.modules()):
            set_mode(self, mode)
            return self
        return super().train(mode)

    # --- the step: override it for custom training --------------------------------------------------------------------

    def train_step(
        self, features: Any, labels: Any, sample_weight: Tensor | None = None
    ) -> Mapping[str, Result]:
        """One batch: forward, loss, backward, metrics, step. Override it for adversarial or other custom training.

        Args:
            features: what goes into the model, on its device; (batch, ...), or a tuple or dict of several inputs.
            labels: what the loss compares with; None where the data has none.
            sample_weight: (batch,), given only where the batches have a third part.

        Returns:
            name -> mean over the batch's rows, or an `Average(total, count)`; the same names at each step. Each is a
            column of the history, weighted by rows.

        >>> class Noisy(Model):
        ...     def train_step(self, features, labels, sample_weight=None):
        ...         return super().train_step(features + torch.randn_like(features), labels, sample_weight)
        >>> model = Noisy(nn.Linear(2, 1))
        >>> model.compile(nn.MSELoss())
        >>> list(model.fit(1, (torch.zeros(8, 2), torch.zeros(8, 1)), verbose=0))
        ['loss']
        """
        outputs = self.compute_outputs(features)
        loss = self.compute_loss(outputs, labels, sample_weight)
        self.backward(loss)
        metrics = self.compute_metrics(
            outputs, labels
        )  # after backward: a metric may edit in place
        self.optimizer_step()  # last: whatever was wrong with this batch has been said before a weight moves
        return {"loss": loss, **metrics}

    def evaluate_step(
        self, features: Any, labels: Any, sample_weight: Tensor | None = None
    ) -> Mapping[str, Result]:
        """One batch of validation, in eval mode, without gradients; `features`, `labels`, `sample_weight`: as above."""
        outputs = self.compute_outputs(features)
        loss = self.compute_loss(outputs, labels, sample_weight)
        return {"loss": loss, **self.compute_metrics(outputs, labels)}

    def compute_outputs(self, features: Any) -> Any:
        """The model called with `features`: whole, or unpacked where `forward` takes several, a dict by its names."""
        run = self._run
        try:
            if run is None:
                return call_with(self, features)
            return run.engine.forward(self, features)
        except Exception as error:
            self._explanations().explain_forward(error, self, features)
            raise

    def compute_loss(
        self, outputs: Any, labels: Any, sample_weight: Tensor | None = None
    ) -> Result:
        """The loss of a batch: `loss_func(outputs, labels)`, a 0-d tensor, or an `Average(total, count)`.

        With `sample_weight` (batch,) the loss must be one per row, as with reduction="none"; the result is the mean
        over the rows of loss * weight, as in Keras; an evaluation without weights takes those of 1. What is no number
        (a tuple is none), and `outputs` and `labels` that would broadcast each other, are a ValueError.
        """
        phase = self._compiled("compute_loss").phase
        try:
            result = phase.checks.loss(outputs, labels)
        except (RuntimeError, IndexError, ValueError) as error:
            phase.explanations.explain_loss(error, outputs, labels)
            raise
        if isinstance(outputs, Tensor) and outputs.ndim == 0:
            phase.explanations.warn_of_squeezed(outputs, labels)
        return scalar_loss(result, sample_weight, not phase.is_training, phase.checks.is_first)

    def compute_metrics(self, outputs: Any, labels: Any) -> dict[str, Result]:
        """Each function of metrics_dict for detached `outputs` and `labels`; objects with an `update` take them in."""
        phase = self._compiled("compute_metrics").phase
        metrics: dict[str, Result] = phase.metrics(detached(outputs), labels)
        if isinstance(phase.batch.rows, UnknownRows):
            phase.need_rows(*metrics.values())
        return metrics

    def backward(self, loss: Result, optimizer: str | None = None) -> None:
        """Fill the gradients of a `loss`, 0-dim or an `Average`: of every parameter, or of one optimizer's.

        `optimizer` is its name. A ValueError where there is no gradient, or no optimizer of that name.
        """
        run = self._compiled("backward")
        phase = run.phase
        if isinstance(phase.batch.rows, UnknownRows):
            phase.need_rows(loss)  # before a weight moves
        run.stepper.backward(loss, phase.batch, optimizer)

    def optimizer_step(self, optimizer: str | None = None) -> None:
        """Move the weights and clear their gradients: by every optimizer, or by the `optimizer` of that name alone."""
        stepper = self._compiled("optimizer_step").stepper
        stepper.close(stepper.due(optimizer))

    @property
    def optimizer_steps(self) -> Any:
        """How many steps the optimizer has taken in the current or last fit, an int.

        A dict of name -> steps if compile was given a dict of optimizers. Under `accumulate` it counts
        steps and not batches; a step that loss scaling skips in float16 counts too.

        >>> model = Model(nn.Linear(2, 1))
        >>> model.compile(nn.MSELoss(), accumulate=2)
        >>> _ = model.fit(3, (torch.zeros(8, 2), torch.zeros(8, 1)), batch_size=2, verbose=0)
        >>> model.optimizer_steps
        6
        """
        steps = self._compiled("optimizer_steps").stepper.named_steps()
        return steps[""] if list(steps) == [""] else steps

    # --- the verbs ----------------------------------------------------------------------------------------------------

    @assemble.explained_call
    def compile(
        self,
        loss_func: Any,
        optimizer: Optimizer | Mapping[str, Optimizer] | None = None,
        metrics_dict: Mapping[str, Any] | None = None,
        device: str | torch.device | None = None,
        *,
        jit: bool | Mapping[str, Any] = False,
        steps_per_execution: int = 1,
        precision: str = "fp32",
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        accumulate: int = 1,
        distributed: str | None = "auto",
        sync_batchnorm: bool = False,
        fsdp_blocks: Any = None,
    ) -> None:
        """Say how to train: loss, optimizer, metrics and device. The history starts anew.

        `state_dict()` stays the same. This takes the place of nn.Module.compile: its torch.compile is `jit=True` here.

        Args:
            loss_func: function or module of (y_pred, y_true), in this order, that gives a 0-d tensor, the mean over
                the batch's rows, or `Average(total, count)` where rows are not the unit. A batch's rows are the first
                size of its labels, or the items of a list of dicts, numbers or images; an int `batch_size` on the
                batch wins. If labels and features contradict each other, only an `Average` is taken.
            optimizer: one, or a dict of name -> optimizer; default Adam(lr=1e-3) on the parameters of the model and,
                where it has some, of the loss.
            metrics_dict: column name -> function of (y_pred, y_true) that gives a number, the mean over the batch's
                rows, or `Average(total, count)`; or an object with update, compute and reset (`minikeras.OnAllRows`,
                torchmetrics), which gives a number, or a dict or tensor with a column for each number. Outputs (N, 1)
                against labels (N,) are refused, in the first batch; not in NumPy. A function that is no mean over rows
                is warned of there.
            device: where to train; default the accelerator (CUDA, XPU, MPS, ...) where there is one, else the CPU.
            jit: compile forward, loss, metrics, backward and optimizer into one graph, several times as fast for small
                models once compiled; or a dict for torch.compile. What cannot be compiled runs in eager, with
                a warning. Dropout draws other numbers, but with {"options": {"fallback_random": True}}. On CUDA a CUDA
                graph is made of the step, but with {"options": {"triton.cudagraphs": False}}.
            steps_per_execution: under jit, optimizer steps in one call of the graph; callbacks see every so many.
            precision: "bf16" or "fp16" (with its gradients scaled) computes forward and loss in that type where torch's
                autocast has it; "auto" takes what a CUDA device can, and float32 elsewhere. Parameters, metrics and
                predictions stay float32. Losses of probabilities are refused: take BCEWithLogitsLoss.
            clip_grad_norm, clip_grad_value: the most that an optimizer's gradients may be, by their norm and each.
            accumulate: batches that make one step, by the gradient of all their rows; the last ones of an epoch may be
                fewer. Each optimizer counts its calls of `optimizer_step`.
            distributed: "auto" trains together with the other processes that torchrun (or a process group) has started:
                each takes batch_size rows of every step; None trains alone. "ddp" is an error where there are none;
                so is "fsdp", where each keeps one part of the weights, gradients and optimizer state.
            sync_batchnorm: BatchNorm over the rows of all processes, not of each (torch.nn.SyncBatchNorm; no CPU).
            fsdp_blocks: module classes put together one at a time; default the children of each ModuleList.

        Raises:
            TypeError: a class where an instance is meant, or something of another kind.
            ValueError: a metric's name that history uses, a device that is not there, or an argument out of its range.
            RuntimeError: a fit of this model is running, in a callback of which `compile` was called.
        """
        self._check_not_fitting(
            "compile", "A learning rate may be changed inside one, in the optimizer's param_groups."
        )
        run = assemble.run_of(
            self,
            loss_func,
            optimizer,
            metrics_dict,
            device,
            jit=jit,
            steps_per_execution=steps_per_execution,
            precision=precision,
            clip_grad_norm=clip_grad_norm,
            clip_grad_value=clip_grad_value,
            accumulate=accumulate,
            distributed=distributed,
            sync_batchnorm=sync_batchnorm,
            fsdp_blocks=fsdp_blocks,
        )
        run.published = {} if self._run is None else self._run.published
        self._run = run
        self._publish("optimizer", run.optimizers.get("") if optimizer is None else optimizer)
        self._publish_history()

    @assemble.explained_call
    def fit(
        self,
        epochs: int,
        dl_train: Any,
        dl_val: Any = None,
        log_step_freq: int | None = None,
        *,
        batch_size: int | None = None,
        steps_per_epoch: int | None = None,
        validation_steps: int | None = None,
        validation_freq: int = 1,
        callbacks: Iterable[Callback] = (),
        verbose: str | int = "auto",
        checkpoint: str | Path | None = None,
        checkpoint_every: int | None = None,
        on_nan: str = "raise",
    ) -> pd.DataFrame:
        """Train, and return the history: one row per epoch since `compile`, index from 0: epoch 1 is row 0.

        Columns: loss, metrics in the order of metrics_dict, other names that train_step returns, the same with val_,
        then lr if it changed. Each value is the mean over the epoch's rows; NaN where validation was skipped. An
        epoch that an error or Ctrl-C cut short leaves no row; the history up to it stays at `model.history`.

        Args:
            epochs: how many more epochs, 1 or more.
            dl_train: a DataLoader; an iterable of (features, labels) or (features, labels, sample_weight) batches; a
                Dataset; or arrays (X, y) as tensors, NumPy arrays, DataFrames or Series. Dataset and arrays are
                shuffled. NumPy and pandas floats are cast to torch's default dtype.
            dl_val: data of any of these kinds for validation; its columns begin with val_.
            log_step_freq: steps between two lines of running means (in a pipe), or refreshes of the bar at the latest.
            batch_size: rows a batch, for a Dataset and arrays; default 32.
            steps_per_epoch: batches an epoch, default all; the next goes on where this one stopped.
            validation_steps: batches of a validation at most, default all. Each begins with a new `iter(dl_val)`; a
                generator goes on where the last one stopped.
            validation_freq: epochs between two validations, default 1.
            callbacks: instances of `minikeras.Callback`.
            verbose: "auto" a bar on a terminal or in a notebook, lines elsewhere; 0 nothing; 1 bar; 2 lines.
            checkpoint: a file for the whole state of the run, written at each epoch's end. Where it is there already,
                the fit goes on from it: weights and history become those of a fit never stopped, bit by bit, unless a
                warning says why not.
            checkpoint_every: steps between two writings within an epoch as well.
            on_nan: what to do about a training loss that is NaN or infinite, before it moves a weight, and about
                weights that are: "raise" an error, "stop" the fit with a warning, or "ignore" it; such weights are
                not written to a file then, with a warning. What was so when the fit began is left alone.

        Raises:
            NotCompiledError: before `compile`.
            TypeError, ValueError: bad arguments, or a bad batch before its step moves a weight.
            CheckpointError: the file is damaged or of another run; or its last writing failed.
            FloatingPointError: the loss is not finite; or weights are not, at an epoch's end and before a file is
                written. The message says where, and what is known of the cause.
            RuntimeError: a fit of this model is running already; or another of several processes has ended or does not
                answer.
        """
        run = self._compiled("fit")
        self._check_not_fitting(
            "fit", "evaluate, predict and a fit of another model may be called inside one."
        )
        fit = assemble.fit_of(
            self,
            run,
            epochs,
            dl_train,
            dl_val,
            log_step_freq=log_step_freq,
            batch_size=batch_size,
            steps_per_epoch=steps_per_epoch,
            validation_steps=validation_steps,
            validation_freq=validation_freq,
            callbacks=callbacks,
            verbose=verbose,
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            on_nan=on_nan,
        )
        loop.fit(fit)
        return run.history()

    @assemble.explained_call
    def evaluate(
        self, dl_val: Any, *, batch_size: int | None = None, steps: int | None = None
    ) -> dict[str, float]:
        """Loss and metrics over all rows: {"val_loss": ..., "val_accuracy": ...}.

        Args:
            dl_val: as in `fit`.
            batch_size: rows a batch, for a Dataset and arrays; default 32. Means over rows do not depend on it.
            steps: batches to evaluate at most, for data that does not end; default all.

        Raises:
            NotCompiledError: before `compile`.
            TypeError, ValueError: no data, or data that the model or the loss cannot take.
        """
        run = self._compiled("evaluate")
        batches = assemble.source_of_evaluation(run, dl_val, batch_size, steps)
        prepare(self, run)
        run.val.begin()
        return loop.evaluate(self, run, batches)

    @assemble.explained_call
    def predict(
        self,
        dl: Any,
        *,
        batch_size: int | None = None,
        gather: str = "all",
        steps: int | None = None,
    ) -> Any:
        """The outputs of every row, in order, on the CPU: a tensor, or the structure that the model returns.

        Needs no compile. Labels in the batches only tell how many rows there are. Lists with an item for each row
        become one list; a key-value cache of transformers is left out.

        Args:
            dl: as in `fit`; X alone will do.
            batch_size: rows a batch, for a Dataset and arrays; default 32.
            gather: of several processes "all" get the outputs, or "main", rank 0, alone and the others None.
            steps: batches to predict at most, for data that does not end; default all.

        Raises:
            TypeError, ValueError: no data, data that the model cannot take, or outputs without rows.
        """
        one_of("gather", gather, ("all", "main"))
        return prediction.predict(self, dl, batch_size, gather == "all", steps)

    def save(self, path: str | Path) -> None:
        """Write the weights, `state_dict()`, to a file that is whole or not there; one there before becomes NAME.prev.

        Args:
            path: ends in .safetensors for that format (pip install safetensors), else what torch.save
                writes; its folder is made. Several processes all make the call and find the file there after it.

        Raises:
            TypeError: the state_dict holds something that `load` could not read back.
            OSError: the file cannot be written; what was there before is there.

        >>> import minikeras, tempfile
        >>> path = tempfile.mkdtemp() + "/weights.pt"
        >>> minikeras.Model(nn.Linear(2, 1)).save(path)
        >>> list(torch.load(path))
        ['net.weight', 'net.bias']
        """
        self._save(path, keep=True)

    def load(self, path: str | Path) -> None:
        """Take over weights from a file of `save`, torch.save(model.state_dict(), path) or `fit(checkpoint=path)`.

        Every byte is checked, and nothing in the file can run. Where the file is damaged and NAME.prev is whole, that
        one is taken, with a warning.

        Raises:
            FileNotFoundError: there is no file.
            CheckpointError: it is damaged, foreign, or of another architecture; the model is as it was.
        """
        assemble.load_weights(self, path)

    def export(self, path: str | Path, example: Any) -> None:
        """Write a program that runs without its code to `path`, for rows like `example`: `minikeras.export.export`."""
        from minikeras.export import export  # on first use, as the next one

        export(self, path, example)

    @assemble.explained_call
    def summary(
        self,
        input_shape: Any = None,
        input_dtype: Any = torch.float32,
        *,
        input_data: Any = None,
        batch_size: int = -1,
    ) -> Summary:
        """Show layers, by `input_shape`, `input_dtype`, `input_data` and `batch_size` as `minikeras.summary` does."""
        from minikeras.report import layer_summary

        return layer_summary.summary(
            self, input_shape, input_dtype, input_data=input_data, batch_size=batch_size
        )

    def _repr_html_(self) -> str | None:
        """Return what a notebook shows of a model."""
        from minikeras.report import notebook

        return notebook.model_html(self)

    @property
    def is_main_process(self) -> bool:
        """Whether this process prints and writes files, rank 0 of several; from `compile` on."""
        return self._run is None or self._run.world.rank == 0

    # --- what holds them together -------------------------------------------------------------------------------------

    def _compiled(self, verb: str) -> Run:
        if self._run is None:
            raise NotCompiledError(
                f"{verb} needs a loss and an optimizer, and {type(self).__name__} has not been compiled. "
                f"Call model.compile(loss_func, optimizer) first."
            )
        return self._run

    def _check_not_fitting(self, verb: str, instead: str) -> None:
        if self._run is not None and self._run.fit is not None:
            raise RuntimeError(
                f"{verb} was called inside a fit of the same model, in a callback or a step: expected a model that is "
                f"not being trained. Call {verb} after fit has returned. {instead}"
            )

    def _explanations(self) -> NoChecks:
        """What says in the user's words why something failed."""
        return assemble.checks_of(self) if self._run is None else self._run.phase.explanations

    def _save(self, path: str | Path, keep: bool) -> None:
        """Write the weights; with `keep` the file that was there becomes NAME.prev."""
        if self._run is None or self._run.allows_writing(path):
            assemble.save_weights(self, path, keep)

    def _publish(self, name: str, value: Any) -> None:
        """Set a plain attribute that torchkeras's users know, unless the subclass has one of its own by that name."""
        published = self._compiled(name).published
        if name in published or not hasattr(self, name):
            published[name] = value
            setattr(self, name, value)

    def _publish_history(self) -> None:
        """Bring `model.history` up to date."""
        self._publish("history", self._compiled("history").history())

    def __getattr__(self, name: str) -> Any:
        """Say `compile` where `history` or `optimizer` is missing; nn.Module finds anything else."""
        if name in ("history", "optimizer") and self._run is None:
            raise AttributeError(
                f"{type(self).__name__} has no {name}: it has not been compiled, or it is a copy or came from "
                f"torch.load, which keep the weights alone. Call model.compile(loss_func, optimizer) first."
            )
        try:
            return super().__getattr__(name)
        except AttributeError:
            assemble.explain_missing_method(type(self).__name__, name)
            raise

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy, which give an uncompiled model."""
        ours = {"_run", *(self._run.published if self._run is not None else ())}
        return {name: value for name, value in self.__dict__.items() if name not in ours}
