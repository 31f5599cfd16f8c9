"""`Model`: an nn.Module with Keras's verbs. Read `train_step` first, then loop.py, which calls it.

compile     loss, optimizer, metrics and device, held in one object beside the module (`_run`)
fit         loop.run_fit: epochs of train_step over batches, validation, history
evaluate    loop.evaluate: evaluate_step over batches
predict     prediction.predict: outputs of every row
save, load  the weights
export      a program that runs without its code
summary     a table of the layers

What compile and fit are asked for is put together in assemble.py, and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
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
from minikeras.errors import NotCompiledError, check_bool, check_one_of
from minikeras.exported import is_exported, set_mode
from minikeras.modes import keep_in_eval
from minikeras.nests import detach_nest
from minikeras.phase import NoChecks
from minikeras.results import LossParts, Result, reduce_loss
from minikeras.rows import UnknownRows
from minikeras.run import Run, prepare

if TYPE_CHECKING:
    from minikeras.diagnosis import Diagnosis, Evidence, Finding
    from minikeras.diagnosis.lr_find import LearningRates
    from minikeras.report.layer_summary import Summary


class Model(nn.Module):
    """An `nn.Module` with Keras's `compile`, `fit`, `evaluate` and `predict`.

    Subclass it and write `forward`, or wrap a network. Losses and metrics are called with
    (y_pred, y_true), as in torch and unlike in TensorFlow.

    Args:
        net: a network to wrap; you can access it as `model.net`. Leave it out in a subclass that
            has its own `forward`.

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

    # at class level: a missing attribute inside an nn.Module is reported as the wrong one
    _run: Run | None = None
    optimizer: Any  # the optimizer or dict of optimizers; set by compile
    history: Any  # the DataFrame that the last fit returned; empty after compile
    stop_training: bool = False  # set it to True in a callback: the fit ends after that batch

    @assemble.explain_constructor_calls
    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        if net is not None:
            self.net: nn.Module = assemble.check_network(net)
        hide_compiled_names(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the wrapped network's outputs; a subclass writes its own forward.

        Raises:
            NotImplementedError: there is neither a network nor a forward.
        """
        if not hasattr(self, "net"):
            raise NotImplementedError(
                f"{type(self).__name__} has no forward. Write it, or wrap a network: Model(net)."
            )
        return self.net(*args, **kwargs)

    def train(self, mode: bool = True) -> Model:
        """Set train mode, or eval mode if `mode` is False, as `nn.Module.train` does.

        An exported program keeps its own mode, and frozen parts stay in eval mode.
        """
        if any(is_exported(module) for module in self.modules()):
            set_mode(self, mode)
        else:
            super().train(mode)
        if mode:
            keep_in_eval(self)
        return self

    # --- the step: override it for custom training ------------------------------------------------

    def train_step(
        self, features: Any, labels: Any, sample_weight: Tensor | None = None
    ) -> Mapping[str, Result]:
        """Train on one batch: forward, loss, backward, metrics, optimizer step.

        Override it for custom training, such as adversarial training.

        Args:
            features: the inputs, on the model's device: (batch, ...), or a tuple or dict of them.
            labels: what the loss compares with; None if the data has none.
            sample_weight: (batch,); passed only if the batches have a third part.

        Returns:
            name -> mean over the batch's rows, or an `Average(total, count)`; the same names in
            every step. Each name is a column of the history, weighted by rows.

        >>> class Noisy(Model):
        ...     def train_step(self, features, labels, sample_weight=None):
        ...         noise = torch.randn_like(features)
        ...         return super().train_step(features + noise, labels, sample_weight)
        >>> model = Noisy(nn.Linear(2, 1))
        >>> model.compile(nn.MSELoss())
        >>> list(model.fit(1, (torch.zeros(8, 2), torch.zeros(8, 1)), verbose=0))
        ['loss']
        """
        outputs = self.compute_outputs(features)
        loss = self.compute_loss(outputs, labels, sample_weight)
        self.backward(loss)
        metrics = self.compute_metrics(outputs, labels)  # after backward: it may edit in place
        self.optimizer_step()  # last: errors of this batch are raised before a weight moves
        return {"loss": loss, **metrics}

    def evaluate_step(
        self, features: Any, labels: Any, sample_weight: Tensor | None = None
    ) -> Mapping[str, Result]:
        """Evaluate one batch, in eval mode and without gradients.

        Args:
            features, labels, sample_weight: as for `train_step`.

        Returns:
            name -> value, as for `train_step`.
        """
        outputs = self.compute_outputs(features)
        loss = self.compute_loss(outputs, labels, sample_weight)
        return {"loss": loss, **self.compute_metrics(outputs, labels)}

    def compute_outputs(self, features: Any) -> Any:
        """Call the model with `features`.

        They are passed whole if `forward` takes one argument, unpacked if it takes several, and by
        name if it takes several and they are a dict.
        """
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
        """Return the loss of a batch, `loss_func(outputs, labels)`.

        With a dict of losses it is their weighted sum; the next `compute_metrics` returns each.

        Args:
            outputs: what the model returned.
            labels: what the batch has.
            sample_weight: (batch,), a weight for each row. The loss must be one value per row then,
                as with reduction="none", and the result is the mean over the rows of loss * weight,
                as in Keras. An evaluation without weights uses weights of 1.

        Returns:
            A 0-d tensor, or an `Average(total, count)`.

        Raises:
            ValueError: the loss is not a number (a tuple is not), or `outputs` and `labels` would
                broadcast each other.
        """
        phase = self._compiled("compute_loss").phase
        try:
            result = phase.checks.loss(outputs, labels)
        except (RuntimeError, IndexError, ValueError) as error:
            phase.explanations.explain_loss(error, outputs, labels)
            raise
        if isinstance(outputs, Tensor) and outputs.ndim == 0:
            phase.explanations.warn_of_squeezed(outputs, labels)
        reduced = reduce_loss(result, sample_weight, not phase.is_training, phase.checks.is_first)
        loss: Result = phase.keep_parts(reduced) if type(reduced) is LossParts else reduced
        return loss

    def compute_metrics(self, outputs: Any, labels: Any) -> dict[str, Result]:
        """Call each function of metrics_dict with detached `outputs` and `labels`.

        Metric objects are updated; they are read at the end of the epoch. With a dict of losses,
        the losses of the last `compute_loss` come first.
        """
        phase = self._compiled("compute_metrics").phase
        metrics: dict[str, Result] = phase.metrics(detach_nest(outputs), labels)
        if phase.loss_parts:
            metrics = phase.take_parts() | metrics
        if isinstance(phase.batch.rows, UnknownRows):
            phase.need_rows(*metrics.values())
        return metrics

    def backward(self, loss: Result, optimizer: str | None = None) -> None:
        """Fill the gradients of a loss, of every parameter or of those of one optimizer.

        Args:
            loss: a 0-d tensor or an `Average`.
            optimizer: the name of one optimizer; default all.

        Raises:
            ValueError: the loss has no gradient, or there is no optimizer of that name.
        """
        run = self._compiled("backward")
        phase = run.phase
        if isinstance(phase.batch.rows, UnknownRows):
            phase.need_rows(loss)  # before a weight moves
        run.stepper.backward(loss, phase.batch, optimizer)

    def optimizer_step(self, optimizer: str | None = None) -> None:
        """Take an optimizer step and clear the gradients.

        Args:
            optimizer: the name of one optimizer; default all.
        """
        stepper = self._compiled("optimizer_step").stepper
        stepper.close(stepper.due(optimizer))

    @property
    def optimizer_steps(self) -> Any:
        """How many steps the optimizer has taken in the current or last fit; 0 before `compile`.

        An int, or a dict of name -> int if `compile` was given a dict of optimizers. With
        `accumulate` it counts steps, not batches. A step that float16's loss scaling skips counts.

        >>> model = Model(nn.Linear(2, 1))
        >>> model.compile(nn.MSELoss(), accumulate=2)
        >>> _ = model.fit(3, (torch.zeros(8, 2), torch.zeros(8, 1)), batch_size=2, verbose=0)
        >>> model.optimizer_steps
        6
        """
        if self._run is None:
            return 0
        steps = self._run.stepper.named_steps()
        return steps[""] if list(steps) == [""] else steps

    # --- the verbs --------------------------------------------------------------------------------

    @assemble.explain_calls
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
        split_batch: Callable[[Any], Any] | None = None,
        distributed: str | None = "auto",
        sync_batchnorm: bool = False,
        fsdp_blocks: Any = None,
    ) -> None:
        """Set how to train: loss, optimizer, metrics and device. The history starts empty.

        It does not train, and adds nothing to `state_dict()`. It replaces nn.Module.compile, whose
        torch.compile is `jit=True` here.

        Args:
            loss_func: a function or module of (y_pred, y_true), in this order. It returns a 0-d
                tensor, the mean over the batch's rows, or `Average(total, count)` if rows are not
                the unit. The number of rows is the first size of the labels, or the number of items
                in a list of dicts, numbers or images; an int `batch_size` on the batch overrides
                it. If labels and features contradict each other, only an `Average` is accepted.
                For several outputs it is a dict of name of an output -> loss or (loss, weight); the
                weighted sum is trained, and each loss has a column, NAME_loss. The names are the
                keys of a dict that forward returns, the fields of a named tuple, or the positions
                0, 1, ... of a tuple; the labels have the same names.
            optimizer: an optimizer, or a dict of name -> optimizer. Default Adam(lr=1e-3) on the
                parameters of the model, and of the loss if it has some.
            metrics_dict: column name -> metric. A metric is a function of (y_pred, y_true) that
                returns the mean over the batch's rows or an `Average(total, count)`; or an object
                with update, compute and reset (`minikeras.OnAllRows`, torchmetrics) that returns a
                number, or a dict or tensor with a column for each number. A metric that broadcasts
                (N, 1) against (N,) raises an error on the first batch; metrics computed in NumPy
                are not checked. A function that is not a mean over rows gets a warning. For several
                outputs it may have a dict of metrics for an output, {output: {name: metric}}, whose
                columns are output_name. `minikeras.Transformed` lets a metric see a function of
                outputs and labels.
            device: where to train. Default the accelerator (CUDA, XPU, MPS, ...) if there is one,
                else the CPU.
            jit: compile forward, loss, metrics, backward and optimizer step into one graph, several
                times as fast for small models after compiling; or a dict of arguments for
                torch.compile. What cannot be compiled runs in eager mode, with a warning. Dropout
                draws different random numbers than in eager mode unless
                {"options": {"fallback_random": True}} is set. On CUDA the step is captured in a
                CUDA graph unless {"options": {"triton.cudagraphs": False}} is set.
            steps_per_execution: with jit, optimizer steps per call of the graph; callbacks are
                called once per call.
            precision: "bf16" or "fp16" (with gradient scaling) computes forward and loss in that
                type where torch's autocast does; "auto" uses what a CUDA device supports, and
                float32 elsewhere. Parameters, metrics and predictions stay float32. A loss of
                probabilities raises an error: use BCEWithLogitsLoss.
            clip_grad_norm: clip gradients to this total norm per optimizer.
            clip_grad_value: clip each element of the gradients to this absolute value.
            accumulate: number of batches per optimizer step; the gradient is the mean over all
                their rows. The last step of an epoch may have fewer. Each optimizer counts its own
                calls of `optimizer_step`.
            split_batch: a function from a batch to (features, labels) or (features, labels,
                sample_weight), for batches of another form, such as dicts with the labels inside
                or tuples of more parts. fit, evaluate and predict call it on each batch as the
                loader gives it, in the main process, before the batch is moved to the device. It
                must not change tensors in place: a list of batches is read again in the next epoch.
                If a batch has no labels, as in predict, it returns (features, None).
            distributed: "auto" trains with the other processes that torchrun (or a process group)
                started: each takes batch_size rows of every step. None trains alone. "ddp" raises
                an error if there are no other processes, and so does "fsdp", which shards weights,
                gradients and optimizer state over the processes.
            sync_batchnorm: compute BatchNorm over the rows of all processes
                (torch.nn.SyncBatchNorm; not on the CPU).
            fsdp_blocks: module classes whose weights are gathered one at a time. Default the
                children of each ModuleList.

        Raises:
            TypeError: an argument is of the wrong type, such as a class instead of an instance; or
                a loss or metric takes the labels first, by the names of its arguments.
            ValueError: a metric has a name that the history uses, a loss has a weight below 0, the
                device does not exist, or an argument is out of range.
            RuntimeError: called in a callback, during a fit of this model.

        >>> model = Model(nn.Linear(2, 1))
        >>> model.compile(nn.MSELoss(), split_batch=lambda batch: (batch["x"], batch["y"]))
        >>> dicts = [{"x": torch.zeros(8, 2), "y": torch.zeros(8, 1)}]
        >>> list(model.fit(1, dicts, verbose=0))
        ['loss']
        """
        self._check_not_fitting(
            "compile", "A learning rate may be changed inside one, in the optimizer's param_groups."
        )
        run = assemble.make_run(
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
            split_batch=split_batch,
            distributed=distributed,
            sync_batchnorm=sync_batchnorm,
            fsdp_blocks=fsdp_blocks,
        )
        run.published = {} if self._run is None else self._run.published
        self._run = run
        self._publish("optimizer", run.optimizers.get("") if optimizer is None else optimizer)
        self._publish_history()

    @assemble.explain_calls
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
        """Train, and return the history: one row per epoch since `compile`; epoch 1 is row 0.

        Columns: loss, the losses of a dict, the metrics in the order of metrics_dict, other names
        that train_step returns, the same with val_, then lr if it changed or a torch scheduler
        sets it. Each value is the mean over the epoch's rows; NaN if validation was skipped. An
        epoch that an error or Ctrl-C interrupts leaves no row; the history up to it is in
        `model.history`.

        Args:
            epochs: epochs to train now, 1 or more; numbering continues from the history.
            dl_train: a DataLoader; an iterable of (features, labels) or (features, labels,
                sample_weight) batches; a Dataset; or arrays (X, y) as tensors, NumPy arrays,
                DataFrames or Series. A Dataset and arrays are shuffled. NumPy and pandas floats are
                cast to torch's default dtype.
            dl_val: validation data of any of these kinds; its columns begin with val_.
            log_step_freq: print running means every this many steps when output is not a terminal;
                on a terminal, refresh the bar at least this often.
            batch_size: rows per batch, for a Dataset and arrays; default 32.
            steps_per_epoch: batches per epoch, default all. The next epoch continues where this one
                stopped.
            validation_steps: maximum batches per validation, default all. Each validation begins
                with a new `iter(dl_val)`; a generator continues where it stopped.
            validation_freq: validate every this many epochs, default 1.
            callbacks: instances of `minikeras.Callback`.
            verbose: "auto" shows a bar on a terminal or in a notebook and prints lines elsewhere;
                0 shows nothing, 1 the bar, 2 lines.
            checkpoint: a file for the whole state of the run, saved at the end of each epoch and
                written while the next one trains; complete when `fit` ends. If the file exists,
                training resumes from it: weights and history are bit-for-bit identical to a fit
                that was never interrupted, unless a warning says why not.
            checkpoint_every: also write it every this many steps within an epoch.
            on_nan: what to do about a NaN or infinite training loss, which is caught before the
                weights are updated, and about weights that are NaN or infinite: "raise" an error,
                "stop" the fit with a warning, or "ignore" it. Such weights are never written to a
                file; "ignore" warns instead. What was NaN or infinite when the fit began is left
                alone.

        Raises:
            NotCompiledError: before `compile`.
            TypeError, ValueError: bad arguments; or a bad batch, before its step moves a weight.
            CheckpointError: the file is damaged or of another run; or the last state of the fit
                could not be written.
            FloatingPointError: the loss is NaN or infinite; or weights are, at the end of an epoch
                or before a file is written. The message says where, and what is known of the cause.
            RuntimeError: a fit of this model is already running; or another process has ended or
                does not answer.
        """
        run = self._compiled("fit")
        self._check_not_fitting(
            "fit", "evaluate, predict and a fit of another model may be called inside one."
        )
        with run.world.verb("fit"):
            fit = assemble.make_fit(
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
            loop.run_fit(fit)
        history = run.history()
        fit.take_history(history)
        return history

    @assemble.explain_calls
    def evaluate(
        self, dl_val: Any, *, batch_size: int | None = None, steps: int | None = None
    ) -> dict[str, float]:
        """Return loss and metrics over all rows: {"val_loss": ..., "val_accuracy": ...}.

        Args:
            dl_val: data as in `fit`.
            batch_size: rows per batch, for a Dataset and arrays; default 32. It does not change
                means over rows.
            steps: maximum number of batches, for data that does not end; default all.

        Raises:
            NotCompiledError: before `compile`.
            TypeError, ValueError: there is no data, or the model or the loss cannot use it.
        """
        run = self._compiled("evaluate")
        with run.world.verb("evaluate"):
            batches = assemble.make_source_of_evaluation(run, dl_val, batch_size, steps)
            run.world.meet(self, run, dl_val=batches, batch_size=batch_size, steps=steps)
            prepare(self, run)
            run.val.begin()
            return loop.evaluate(self, run, batches)

    @assemble.explain_calls
    def predict(
        self,
        dl: Any,
        *,
        batch_size: int | None = None,
        gather: str = "all",
        steps: int | None = None,
        return_labels: bool = False,
        join: bool = True,
    ) -> Any:
        """Return the outputs for every row, in order, on the CPU.

        They are a tensor, or the structure that the model returns. No compile is needed. Labels in
        the batches are used only to count rows, unless `return_labels`. Lists with an item for each
        row become one list; a key-value cache of transformers is left out.

        Args:
            dl: data as in `fit`, or X alone. Inputs need a batch dimension: for one row pass
                `X[:1]`, not `X[0]`.
            batch_size: rows per batch, for a Dataset and arrays; default 32.
            gather: with several processes "all" get the outputs; with "main" only rank 0 gets them,
                the others get None, or with `return_labels` (None, None).
            steps: maximum number of batches, for data that does not end; default all.
            return_labels: return (outputs, labels), from one pass over `dl`: row i of the labels
                belongs to row i of the outputs, also if the loader shuffles. The labels are joined
                like the outputs, on the CPU, in the structure that they have in the batches.
            join: False returns a list with the outputs of each batch, for outputs that cannot be
                joined, such as sequences of another length in each batch; with `return_labels` a
                pair of lists. With several processes the list has the batches of all, in the
                loader's order.

        Raises:
            TypeError, ValueError: there is no data, the model cannot use it, its outputs have no
                rows, or labels are asked for and there are none.

        >>> model = Model(nn.Identity())
        >>> X, y = torch.arange(3.0).reshape(3, 1), torch.tensor([7, 8, 9])
        >>> loader = torch.utils.data.DataLoader([*zip(X, y)], batch_size=2, shuffle=True)
        >>> outputs, labels = model.predict(loader, return_labels=True)
        >>> torch.equal(outputs[:, 0] + 7, labels)
        True
        >>> [len(batch) for batch in model.predict(loader, join=False)]
        [2, 1]
        """
        check_one_of("gather", gather, ("all", "main"))
        check_bool("return_labels", return_labels)
        check_bool("join", join)
        wanted = prediction.Wanted(return_labels, join, everywhere=gather == "all")
        return prediction.predict(self, dl, batch_size, steps, wanted)

    def save(self, path: str | Path) -> None:
        """Save the weights, `state_dict()`, atomically; an existing file becomes NAME.prev.

        Args:
            path: a path that ends in .safetensors for that format (pip install safetensors); any
                other is written by torch.save. Folders are created. With several processes all of
                them call it, and find the file when it returns.

        Raises:
            TypeError: the state_dict holds something that `load` could not read.
            OSError: the file cannot be written; an existing file is unchanged.

        >>> import minikeras, tempfile
        >>> path = tempfile.mkdtemp() + "/weights.pt"
        >>> minikeras.Model(nn.Linear(2, 1)).save(path)
        >>> list(torch.load(path))
        ['net.weight', 'net.bias']
        """
        self._save(path, keep=True)

    def load(self, path: str | Path) -> None:
        """Load weights from a file.

        The file is of `save`, of torch.save(model.state_dict(), path), or a checkpoint of `fit`.

        Every byte is verified, and nothing in the file can run. If the file is damaged and
        NAME.prev is not, that is loaded, with a warning.

        Raises:
            FileNotFoundError: there is no such file.
            CheckpointError: the file is damaged, of another kind, or of another architecture; the
                model is unchanged.
        """
        assemble.load_weights(self, path)

    def export(self, path: str | Path, example: Any) -> None:
        """Write a program that runs without the model's code: see `minikeras.export.export`.

        Args:
            path: the file, .pt2 or .onnx.
            example: rows such as the program will get.
        """
        from minikeras.export import export  # on first use, as the next one

        export(self, path, example)

    @assemble.explain_calls
    def summary(
        self,
        input_shape: Any = None,
        input_dtype: Any = torch.float32,
        *,
        input_data: Any = None,
        batch_size: int = -1,
    ) -> Summary:
        """Show the layers as a table: see `minikeras.summary`.

        Args:
            input_shape, input_dtype, input_data, batch_size: as for `minikeras.summary`.
        """
        from minikeras.report import layer_summary

        return layer_summary.summary(
            self, input_shape, input_dtype, input_data=input_data, batch_size=batch_size
        )

    @assemble.explain_calls
    def diagnose(
        self,
        dl_train: Any,
        dl_val: Any = None,
        *,
        steps: int = 100,
        batch_size: int | None = None,
        checks: Iterable[Callable[[Evidence], Iterable[Finding]]] = (),
    ) -> Diagnosis:
        """Find out why the model does not learn: show a table of what is wrong and what to do.

        It looks at the data, calls copies of the model, trains them for a few steps, and reads the
        history. The model, its optimizers, the random states and the data are bit-for-bit identical
        afterwards.

        Args:
            dl_train: data as in `fit`; about 4,000 rows are looked at.
            dl_val: validation data, to compare with; default none.
            steps: steps of each trial training, default 100.
            batch_size: rows per batch, for a Dataset and arrays; default 32.
            checks: your own checks, functions of a `minikeras.diagnosis.Evidence` that return a
                list of `minikeras.diagnosis.Finding`, or yield them.

        Returns:
            A `minikeras.diagnosis.Diagnosis`: its `findings`, the `warnings` among them,
            `to_dataframe()` and `plot()`.

        Raises:
            NotCompiledError: before `compile`.
            TypeError: data that reading would use up, a model that cannot be copied, or a check
                that is no function.
            ValueError: steps below 1, or a model in parts in several processes.

        >>> _ = torch.manual_seed(0)
        >>> x = torch.randn(256, 3)
        >>> y = x[:, :1] - x[:, 1:2]
        >>> x[:, 2] = 7.0
        >>> model = Model(nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 1)))
        >>> optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        >>> model.compile(nn.MSELoss(), optimizer, device="cpu")
        >>> diagnosis = model.diagnose((x, y))  # doctest: +ELLIPSIS
        Diagnosis of Model: 1 warning
        ...
        1. column 2 of features: one value in all 256 rows (usual: values that differ)
           A constant column tells nothing. Drop it, or look at how it is read.
        ...
        Looked at 256 rows of dl_train; steps=100; ... s.
        >>> diagnosis.findings[0].found
        'one value in all 256 rows'
        """
        from minikeras.diagnosis.diagnose import diagnose

        return diagnose(self, dl_train, dl_val, steps, batch_size, checks)

    @assemble.explain_calls
    def lr_find(
        self,
        dl_train: Any,
        min_lr: float = 1e-7,
        max_lr: float = 10.0,
        steps: int = 100,
        *,
        batch_size: int | None = None,
    ) -> LearningRates:
        """Find a learning rate: train a copy while the rate rises from min_lr to max_lr.

        This is the range test of Smith 2017, "Cyclical Learning Rates for Training Neural
        Networks", section 3.3: step i has the rate min_lr * (max_lr / min_lr) ** (i / (steps - 1)).
        It stops when the loss has diverged. The copy is compiled as the model was, with jit,
        precision, accumulate and several processes; it begins with the weights and the optimizer
        state of the model. The model, its optimizers, the random states and the data are
        bit-for-bit identical afterwards.

        Args:
            dl_train: data as in `fit`; it starts again if it is exhausted.
            min_lr, max_lr: learning rates of the first and the last step, of the first group of the
                first optimizer. Other groups and optimizers keep their ratio to it.
            steps: optimizer steps, 2 or more, default 100; each takes `accumulate` batches.
            batch_size: rows per batch, for a Dataset and arrays; default 32.

        Returns:
            A `minikeras.diagnosis.LearningRates`: `suggestion`, the rate at which the loss falls
            most steeply, or None; `diverges_at`, or None; `to_dataframe()` with a row per step and
            the columns lr, loss and smoothed_loss; `plot()`.

        Raises:
            NotCompiledError: before `compile`.
            TypeError: data that reading would use up, or a model that cannot be copied.
            ValueError: limits that are not 0 < min_lr < max_lr; steps below 2; an optimizer without
                a learning rate, or with 0 in its first group; a model in parts in several
                processes.

        >>> _ = torch.manual_seed(0)
        >>> x = torch.linspace(-1, 1, 64).reshape(-1, 1)
        >>> model = Model(nn.Linear(1, 1))
        >>> model.compile(nn.MSELoss(), torch.optim.SGD(model.parameters(), lr=0.1), device="cpu")
        >>> found = model.lr_find((x, 3 * x + 1), steps=50)
        >>> 0.01 < found.suggestion < 1, found.diverges_at is None
        (True, False)
        >>> list(found.to_dataframe())
        ['lr', 'loss', 'smoothed_loss']
        """
        from minikeras.diagnosis.lr_find import lr_find

        return lr_find(self, dl_train, min_lr, max_lr, steps, batch_size)

    def _repr_html_(self) -> str | None:
        """Return what a notebook shows of a model."""
        from minikeras.report import notebook

        return notebook.model_html(self)

    @property
    def is_main_process(self) -> bool:
        """Whether this process prints and writes files, as rank 0 does; True before `compile`."""
        return self._run is None or self._run.world.rank == 0

    # --- what holds them together -----------------------------------------------------------------

    def _compiled(self, verb: str) -> Run:
        if self._run is None:
            raise NotCompiledError(
                f"{verb} needs a loss and an optimizer, and {type(self).__name__} has not been "
                f"compiled. Call model.compile(loss_func, optimizer) first."
            )
        return self._run

    def _check_not_fitting(self, verb: str, instead: str) -> None:
        if self._run is not None and self._run.fit is not None:
            raise RuntimeError(
                f"{verb} was called inside a fit of the same model, in a callback or a step: "
                f"expected a model that is not being trained. Call {verb} after fit has returned. "
                f"{instead}"
            )

    def _explanations(self) -> NoChecks:
        """What says in the user's words why something failed."""
        return (
            assemble.make_explanations(self) if self._run is None else self._run.phase.explanations
        )

    def _save(self, path: str | Path, keep: bool) -> None:
        """Write the weights; with `keep` the file that was there becomes NAME.prev."""
        if self._run is None:
            assemble.save_weights(self, path, keep)
            return
        with self._run.world.verb("save"):
            self._run.world.meet(self)
            if self._run.allows_writing(path):
                assemble.save_weights(self, path, keep)

    def _publish(self, name: str, value: Any) -> None:
        """Set a plain attribute that torchkeras's users know, unless the subclass has its own."""
        published = self._compiled(name).published
        if name in published or not hasattr(self, name):
            published[name] = value
            setattr(self, name, value)

    def _publish_history(self) -> None:
        """Bring `model.history` up to date."""
        self._publish("history", self._compiled("history").history())

    def __getattr__(self, name: str) -> Any:
        """Name `compile` if `history` or `optimizer` is missing; nn.Module finds anything else."""
        if name in ("history", "optimizer") and self._run is None:
            raise AttributeError(
                f"{type(self).__name__} has no {name}: it has not been compiled, or it is a copy "
                f"or came from torch.load, which keep the weights alone. Call "
                f"model.compile(loss_func, optimizer) first."
            )
        try:
            return super().__getattr__(name)
        except AttributeError:
            assemble.explain_missing_method(type(self).__name__, name)
            raise

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for pickle and deepcopy, which give an uncompiled model."""
        ours = {"_run", *(self._run.published if self._run is not None else ())}
        return {name: value for name, value in self.__dict__.items() if name not in ours}
