"""`Model`: an nn.Module with Keras's verbs. Read `train_step` first, then loop.py for what calls it.

compile     loss, optimizer, metrics and device, held in one object beside the module (`_run`)
fit         loop.fit: epochs of train_step over batches, validation, history
evaluate    loop.evaluate: evaluate_step over batches
predict     prediction.predict: outputs of every row
save, load  checkpoint.save_weights, load_weights
export      export.export
summary     layer_summary.summary
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from minikeras import checks, export, layer_summary, loop, prediction
from minikeras.callbacks import (
    Callback,
    LambdaCallback,
    check_callbacks,
    check_monitors,
    check_places,
    rate_name,
)
from minikeras.checkpoint import Checkpoint, load_weights, save_weights, under_plain_names
from minikeras.data import ContinuedBatches, UnknownRows, call_with, check_ends, length, limited
from minikeras.errors import NotCompiledError, one_of, positive_int
from minikeras.exported import is_exported, set_mode
from minikeras.metrics import detached
from minikeras.modes import TrainingModes
from minikeras.notebook import model_html, progress
from minikeras.paths import user_path
from minikeras.progress import say_nothing, show
from minikeras.results import Result, mean_of, scalar_loss, with_gradient
from minikeras.run import Run, check_optimizers, made, names_logged, ready


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

    @checks.calls.built_in_other_words
    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        if net is not None:
            self.net: nn.Module = checks.inputs.network(net)
        under_plain_names(self)

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
            return (
                run.jit.forward(features)
                if run is not None and run.by_parts
                else call_with(self, features)
            )
        except Exception as error:
            checks.causes.explain_forward(error, self, features, None if run is None else run.world)
            raise

    def compute_loss(
        self, outputs: Any, labels: Any, sample_weight: Tensor | None = None
    ) -> Result:
        """The loss of a batch: `loss_func(outputs, labels)`, a 0-d tensor, or an `Average(total, count)`.

        With `sample_weight` (batch,) the loss must be one per row, as with reduction="none"; the result is the mean
        over the rows of loss * weight, as in Keras; an evaluation without weights takes those of 1. What is no number
        (a tuple is none), and `outputs` and `labels` that would broadcast each other, are a ValueError.
        """
        run = self._compiled("compute_loss")
        if run.totals.unseen:
            training, fitting = run.totals is run.train, not run.train.unseen
            checks.inputs.check_loss_inputs(run.loss_func, outputs, labels, training, self, fitting)
        try:
            loss_func = (
                run.jit.loss_func if run.by_parts and not run.totals.unseen else run.loss_func
            )
            result = run.call("the loss", loss_func, outputs, labels, scalar=False)
        except (RuntimeError, IndexError, ValueError) as error:
            checks.causes.explain_squeezed(error, outputs, labels)
            checks.causes.explain_loss(error, outputs, labels)  # plainer, where it can
            raise
        if isinstance(outputs, Tensor) and outputs.ndim == 0:
            checks.causes.warn_of_squeezed(outputs, labels)
        per_row = run.totals is run.val
        return scalar_loss(result, sample_weight, per_row, wait=run.totals.unseen)

    def compute_metrics(self, outputs: Any, labels: Any) -> dict[str, Result]:
        """Each function of metrics_dict for detached `outputs` and `labels`; objects with an `update` take them in."""
        run = self._compiled("compute_metrics")
        if run.precision is not None:
            metrics = run.precision.metrics(run.totals, detached(outputs), labels, run.call)
        else:
            metrics = run.totals.metrics(detached(outputs), labels, run.call)
        if isinstance(run.rows, UnknownRows):
            run.check_rows(*metrics.values())
        return metrics

    def backward(self, loss: Result, optimizer: str | None = None) -> None:
        """Fill the gradients of a `loss`, 0-dim or an `Average`: of every parameter, or of one optimizer's.

        `optimizer` is its name. A ValueError where there is no gradient, or no optimizer of that name.
        """
        run = self._compiled("backward")
        if isinstance(run.rows, UnknownRows):
            run.check_rows(loss)  # before a weight moves
        mean = with_gradient(mean_of(loss))
        if run.finite_loss is not None and not run.totals.idle:
            run.finite_loss.look(mean)
        inputs = None if optimizer is None else run.inputs(optimizer)
        if run.precision is None:
            mean.backward(inputs=inputs)
        else:
            rows = 0 if run.totals.idle else run.rows
            run.precision.backward(loss, mean, rows, run.named(optimizer), inputs)

    def optimizer_step(self, optimizer: str | None = None) -> None:
        """Move the weights and clear their gradients: by every optimizer, or by the `optimizer` of that name alone."""
        run = self._compiled("optimizer_step")
        if run.precision is not None:
            run.precision.step(run.named(optimizer))
            return
        for one in run.named(optimizer):
            one.step()
            one.zero_grad()

    # --- the verbs ----------------------------------------------------------------------------------------------------

    @checks.calls.in_other_words
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
        big: Any = {
            "clip_grad_norm": clip_grad_norm,
            "clip_grad_value": clip_grad_value,
            "accumulate": accumulate,
        }
        more = (jit, steps_per_execution, precision, distributed, sync_batchnorm, fsdp_blocks)
        run = made(self, loss_func, optimizer, metrics_dict, device, *more, **big)
        run.published = {} if self._run is None else self._run.published
        self._run = run
        self._publish("optimizer", run.optimizers.get("") if optimizer is None else optimizer)
        self._publish("history", run.history())

    @checks.calls.in_other_words
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
        saved = Checkpoint(checkpoint, checkpoint_every)
        one_of("on_nan", on_nan, ("raise", "stop", "ignore"))
        epochs = positive_int("epochs", epochs, hint=checks.calls.order_of_fit(epochs, dl_train))
        validation_freq = positive_int("validation_freq", validation_freq)
        if log_step_freq is not None:
            positive_int("log_step_freq", log_step_freq)
        if validation_steps is not None:
            validation_steps = positive_int("validation_steps", validation_steps)
        train, val = run.batches_of_fit(
            dl_train, dl_val, batch_size, epochs, steps_per_epoch, validation_freq, validation_steps
        )
        listed = check_callbacks(callbacks)
        train = saved.watched(train, val, self, run, listed)
        if steps_per_epoch is not None:
            train = ContinuedBatches(
                train, positive_int("steps_per_epoch", steps_per_epoch), "dl_train"
            )
        check_places(listed, saved.path)
        rates = [rate_name(name) for name in run.optimizers]
        check_monitors(listed, val is not None, names_logged(self, run, val is not None), rates)
        check_optimizers(self, run)
        ready(self, run)
        run.modes = TrainingModes(self)
        run.modes.look()
        last = saved.open(self, run, epochs)
        saved.check_length(length(train))
        say = say_nothing
        if show(verbose) and self.is_main_process:
            table = progress(
                verbose, last, length(train), log_step_freq, val is not None, run.best_val_loss()
            )
            say = table.say
            listed.append(table)
        listed.append(
            LambdaCallback(on_fit_end=lambda: self._publish("history", run.history()))
        )  # before the others
        loop.fit(
            self, run, loop.Plan(last, train, val, validation_freq, listed, say, saved, on_nan)
        )
        return run.history()

    @checks.calls.in_other_words
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
        if steps is not None:
            steps = positive_int("steps", steps)
        check_ends(dl_val, "dl_val", steps, "steps")
        batches = limited(run.batches(dl_val, "dl_val", batch_size), steps, "dl_val", "steps")
        ready(self, run)
        run.val.unseen = True
        return loop.evaluate(self, run, batches)

    @checks.calls.in_other_words
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
        if steps is not None:
            steps = positive_int("steps", steps)
        check_ends(dl, "dl", steps, "steps")
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
        run = self._run
        if (
            run is not None
            and run.finite_weights is not None
            and not run.finite_weights.allow(path)
        ):
            return
        save_weights(self, user_path(path), None if run is None else run.world)

    def load(self, path: str | Path) -> None:
        """Take over weights from a file of `save`, torch.save(model.state_dict(), path) or `fit(checkpoint=path)`.

        Every byte is checked, and nothing in the file can run. Where the file is damaged and NAME.prev is whole, that
        one is taken, with a warning.

        Raises:
            FileNotFoundError: there is no file.
            CheckpointError: it is damaged, foreign, or of another architecture; the model is as it was.
        """
        load_weights(self, user_path(path))

    def export(self, path: str | Path, example: Any) -> None:
        """Write a program that runs without its code to `path`, for rows like `example`: `minikeras.export.export`."""
        export.export(self, path, example)

    @checks.calls.in_other_words
    def summary(
        self,
        input_shape: Any = None,
        input_dtype: Any = torch.float32,
        *,
        input_data: Any = None,
        batch_size: int = -1,
    ) -> layer_summary.Summary:
        """Show layers, by `input_shape`, `input_dtype`, `input_data` and `batch_size` as `minikeras.summary` does."""
        return layer_summary.summary(
            self, input_shape, input_dtype, input_data=input_data, batch_size=batch_size
        )

    _repr_html_ = model_html  # what a notebook shows of a model

    @property
    def is_main_process(self) -> bool:
        """Whether this process is the one that prints and writes files, rank 0 of several; from `compile` on."""
        return self._run is None or self._run.world is None or self._run.world.rank == 0

    # --- what holds them together -------------------------------------------------------------------------------------

    def _compiled(self, verb: str) -> Run:
        if self._run is None:
            raise NotCompiledError(
                f"{verb} needs a loss and an optimizer, and {type(self).__name__} has not been compiled. "
                f"Call model.compile(loss_func, optimizer) first."
            )
        return self._run

    def _check_not_fitting(self, verb: str, instead: str) -> None:
        if self._run is not None and self._run.fitting:
            raise RuntimeError(
                f"{verb} was called inside a fit of the same model, in a callback or a step: expected a model that is "
                f"not being trained. Call {verb} after fit has returned. {instead}"
            )

    def _publish(self, name: str, value: Any) -> None:
        """Set a plain attribute that torchkeras's users know, unless the subclass has one of its own by that name."""
        published = self._compiled(name).published
        if name in published or not hasattr(self, name):
            published[name] = value
            setattr(self, name, value)

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
            checks.calls.missing_method(type(self).__name__, name)
            raise

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy, which give an uncompiled model."""
        ours = {"_run", *(self._run.published if self._run is not None else ())}
        return {name: value for name, value in self.__dict__.items() if name not in ours}
