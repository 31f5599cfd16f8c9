"""Calls as in other libraries raise errors with the line to write here; the line works."""

import copy
import functools
import re

import numpy
import pytest
import torch
from helpers.models import points
from torch import nn

import minikeras

X, y = points(40)


def model():
    made = minikeras.Model(nn.Linear(2, 1))
    made.compile(nn.MSELoss(), device="cpu")
    return made


LOADER = [(X, y)]
CALLS = {
    "fit(X, y, epochs=)": (lambda m: m.fit(X, y, epochs=2), "Write model.fit(2, (X, y))."),
    "fit(x=, y=, epochs=)": (lambda m: m.fit(x=X, y=y, epochs=2), "Write model.fit(2, (X, y))."),
    "fit((X, y), epochs=)": (lambda m: m.fit((X, y), epochs=2), "Write model.fit(2, (X, y))."),
    "validation_data": (
        lambda m: m.fit(2, (X, y), validation_data=(X, y), batch_size=8),
        "Write model.fit(2, (X, y), dl_val=(X_val, y_val), batch_size=8).",
    ),
    "train_data": (
        lambda m: m.fit(train_data=LOADER, val_data=LOADER, epochs=3, patience=5),
        "Pass callbacks=[minikeras.EarlyStopping(monitor, patience=5)]. Write model.fit(3, "
        "dl_train, dl_val=dl_val).",
    ),
    "validation_split": (lambda m: m.fit(2, (X, y), validation_split=0.2), "Split the rows before"),
    "class_weight": (
        lambda m: m.fit(2, (X, y), class_weight={0: 1.0}),
        "nn.CrossEntropyLoss(weight=...)",
    ),
    "shuffle": (
        lambda m: m.fit(2, (X, y), shuffle=False),
        "DataLoader(TensorDataset(X, y), batch_size=32)",
    ),
    "initial_epoch": (lambda m: m.fit(2, (X, y), initial_epoch=3), "continue from the history"),
    "nb_epoch": (lambda m: m.fit((X, y), nb_epoch=3), "Write model.fit(3, (X, y))."),
    "ckpt_path": (lambda m: m.fit(2, LOADER, ckpt_path="a.pt"), "minikeras.ModelCheckpoint(path)"),
    "a misspelt argument": (lambda m: m.fit(2, (X, y), batchsize=3), "Did you mean 'batch_size'?"),
    "compile of names": (
        lambda m: m.compile(optimizer="adam", loss="mse", metrics=["mae"]),
        "Write model.compile(nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=1e-3), "
        'metrics_dict={"mae": nn.L1Loss()}).',
    ),
    "compile with accuracy": (
        lambda m: m.compile(loss=nn.CrossEntropyLoss(), metrics=["accuracy"]),
        'metrics_dict={"accuracy": minikeras.accuracy}).',
    ),
    "compile with accuracy of probabilities": (
        lambda m: m.compile(loss="binary_crossentropy", metrics=["accuracy"]),
        'metrics_dict={"accuracy": minikeras.binary_accuracy}).',
    ),
    "compile with accuracy of raw scores": (
        lambda m: m.compile(loss=nn.BCEWithLogitsLoss(), metrics=["acc"]),
        'metrics_dict={"acc": functools.partial(minikeras.binary_accuracy, threshold=0.0)}).',
    ),
    "evaluate(X, y)": (lambda m: m.evaluate(X, y), "Write model.evaluate((X, y))."),
    "predict(X, 64)": (lambda m: m.predict(X, 64), "Write model.predict(X, batch_size=64)."),
    "predict(verbose=)": (
        lambda m: m.predict(X, verbose=0),
        "predict prints nothing. Write model.predict(X).",
    ),
    "predict(return_ground_truth=)": (
        lambda m: m.predict((X, y), return_ground_truth=True),
        "Pass return_labels=True. Write model.predict(X).",
    ),
    "predict(concatenate_returns=)": (
        lambda m: m.predict(X, concatenate_returns=False),
        "Pass join=False for a list with the outputs of each batch. Write model.predict(X).",
    ),
}


@pytest.mark.parametrize(("call", "message"), CALLS.values(), ids=CALLS)
def test_fit_called_as_in_another_library_raises_an_error_with_the_line_that_works(call, message):
    made = model()
    with pytest.raises(TypeError, match=re.escape(message)) as raised:
        call(made)
    line = re.search(r"Write (model\..*)\.$", str(raised.value))[1]
    names = {"X": X, "y": y, "X_val": X, "y_val": y, "dl_train": LOADER, "dl_val": LOADER}
    names |= {"functools": functools, "minikeras": minikeras}
    eval(line, names | {"model": made, "nn": nn, "torch": torch})


def test_argument_names_of_other_libraries_raise_an_error_with_the_one_here():
    for name in ("KerasModel", "LightModel", "Trainer"):
        with pytest.raises(AttributeError, match=r"In minikeras it is minikeras\.Model"):
            getattr(minikeras, name)
        assert not hasattr(minikeras, name)
        with pytest.raises(ImportError, match=r"In minikeras it is minikeras\.Model"):
            exec(f"from minikeras import {name}")
    assert not hasattr(minikeras, "nothing")
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        exec("from minikeras import nothing")


EXPLAINED = {
    "loss_weights": "The dict of losses takes them: loss_func={name: (loss, weight)}.",
    "clipnorm": "Pass clip_grad_norm=..., for the norm of all gradients together.",
    "clipvalue": "Pass clip_grad_value=....",
    "scheduler": "Pass it to fit: fit(callbacks=[minikeras.LRScheduler(scheduler)]).",
}


@pytest.mark.parametrize("name", EXPLAINED)
def test_compile_with_one_argument_of_another_library_explains_that_argument_alone(name):
    made = model()
    message = f"compile() got an unexpected keyword argument {name!r}. {EXPLAINED[name]}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        made.compile(nn.L1Loss(), **{name: 1.0})


FIRST = {
    "fit(loader, loader, 2)": (lambda m: m.fit(LOADER, LOADER, 2), "fit(5, dl_train, dl_val)"),
    "fit(loader, 2)": (lambda m: m.fit(LOADER, 2), "fit(2, dl_train)"),
    "fit(X, y, 2)": (lambda m: m.fit(X, y, 2), "fit(5, (X, y))"),
    "fit((X, y), 2)": (lambda m: m.fit((X, y), 2), "fit(5, (X, y))"),
}


@pytest.mark.parametrize(("call", "line"), FIRST.values(), ids=FIRST)
def test_fit_with_data_before_the_epochs_raises_an_error_with_the_line_that_works(call, line):
    made = model()
    with pytest.raises(ValueError, match=re.escape(f"Epochs come first: {line}.")):
        call(made)
    eval(f"m.{line}", {"m": made, "X": X, "y": y, "dl_train": LOADER, "dl_val": LOADER})


def test_model_constructor_with_a_loss_raises_an_error_with_the_compile_line_that_works():
    net = nn.Linear(2, 1)
    calls = (
        lambda: minikeras.Model(
            net, loss_fn=nn.MSELoss(), optimizer=torch.optim.SGD(net.parameters())
        ),
        lambda: minikeras.Model(net, nn.MSELoss(), {"mae": nn.L1Loss()}),
    )
    for call in calls:
        with pytest.raises(TypeError, match="compile takes the loss") as raised:
            call()
        written = re.search(
            r"Write (model = .*), then (model\.compile\(.*\))\.$", str(raised.value)
        )
        names = {"minikeras": minikeras, "net": net, "nn": nn, "torch": torch}
        for line in written.groups():
            exec(line, names)
        assert len(names["model"].fit(1, (X, y), verbose=0)) == 1


def test_methods_that_freeze_raise_an_error_that_names_the_function():
    made = minikeras.Model(nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1)))
    lines = {
        "freeze": "minikeras.freeze(model.net)",
        "unfreeze": "minikeras.unfreeze(model.net)",
        "freeze_to": "minikeras.freeze(model.net[:n])",
    }
    for name, line in lines.items():
        message = rf"has no attribute '{name}'\. Write {re.escape(line)},"
        with pytest.raises(AttributeError, match=message):
            getattr(made, name)
        eval(line, {"minikeras": minikeras, "model": made, "n": 1})
    assert [parameter.requires_grad for parameter in made.parameters()] == [
        False,
        False,
        True,
        True,
    ]


def test_keras_methods_raise_an_error_that_says_what_to_write():
    made = model()
    for name in ("predict_proba", "train_on_batch", "save_weights", "load_ckpt"):
        with pytest.raises(AttributeError, match=rf"has no attribute '{name}'\. .*model\."):
            getattr(made, name)
        assert not hasattr(made, name)
    made.fit(1, [(X, y)], verbose=0)  # as train_on_batch says
    assert made.evaluate([(X, y)]).keys() == {"val_loss"}

    class Own(minikeras.Model):
        def predict_proba(self, features):
            return self.predict(features)

    assert Own(nn.Linear(2, 1)).predict_proba(X).shape == (40, 1)


def test_predict_of_one_row_without_a_batch_dimension_raises_an_error_that_says_what_to_pass():
    made = model()
    for data in (X[0], X[0].numpy(), list(X)):
        with pytest.raises(
            ValueError, match=r"For one row pass X\[:1\], not X\[0\].*torch\.stack\(rows\)"
        ):
            made.predict(data)
    assert made.predict(X[:1]).shape == (1, 1)
    assert torch.equal(made.predict(torch.stack(list(X))), made.predict(X))


def test_rows_in_python_lists_raise_an_error_that_says_to_make_an_array():
    made = model()
    rows = X.tolist()
    with pytest.raises(TypeError) as raised:
        made.predict(rows)
    assert "pass numpy.array(rows, dtype='float32')" in raised.value.__notes__[0]
    torch.testing.assert_close(made.predict(numpy.array(rows, dtype="float32")), made.predict(X))
    with pytest.raises(TypeError, match=r"numpy\.array\(rows\)"):
        made.fit(1, (rows, y.tolist()), verbose=0)
    made.fit(1, (numpy.array(rows), numpy.array(y.tolist())), verbose=0)


def test_validation_batch_that_is_none_is_refused_before_a_step():
    steps = []
    made = model()
    count = minikeras.LambdaCallback(on_batch_end=lambda *_: steps.append(1))
    with pytest.raises(TypeError, match=r"the first batch is None; expected \(features, labels\)"):
        made.fit(1, (X, y), dl_val=[None], verbose=0, callbacks=[count])
    assert not steps


def test_history_and_optimizer_of_a_model_that_is_not_compiled_raise_an_error_that_says_compile():
    for made in (minikeras.Model(nn.Linear(2, 1)), copy.deepcopy(model())):
        for name in ("history", "optimizer"):
            with pytest.raises(AttributeError, match=rf"has no {name}.*Call model\.compile"):
                getattr(made, name)
            assert not hasattr(made, name)
        made.compile(nn.MSELoss(), device="cpu")
        assert len(made.history) == 0
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        model().nothing  # noqa: B018


@pytest.mark.parametrize(
    "data", [torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8).numpy()], ids=["tensor", "array"]
)
def test_summary_with_a_batch_as_a_shape_raises_an_error_of_one_line(data, capsys):
    net = nn.Conv2d(3, 8, 3)
    for call in (lambda: minikeras.summary(net, data), lambda: minikeras.Model(net).summary(data)):
        with pytest.raises(
            ValueError, match=r"of shape \(4, 3, 8, 8\).*summary\(net, input_data=batch\)"
        ) as raised:
            call()
        assert "\n" not in str(raised.value)
    minikeras.summary(net, input_data=torch.as_tensor(data))
    minikeras.summary(net, (3, 8, 8))


def test_compile_with_the_name_of_a_loss_raises_an_error_with_the_object():
    made = minikeras.Model(nn.Linear(2, 1))
    with pytest.raises(
        TypeError,
        match=r"got 'mae'\. Strings are not accepted: pass for instance nn\.L1Loss\(\)",
    ):
        made.compile("mae", torch.optim.Adam(made.parameters()))
    with pytest.raises(TypeError, match=r"got 'adam'.*the optimizer comes second"):
        made.compile("adam", "mse")
    with pytest.raises(
        TypeError, match=r"got the optimizer Adam\. Write compile\(loss_func, optimizer\)"
    ):
        made.compile(torch.optim.Adam(made.parameters()), nn.MSELoss())
    with pytest.raises(TypeError, match=r"metric 'acc' .*pass for instance minikeras\.accuracy\."):
        made.compile(nn.MSELoss(), metrics_dict={"acc": "accuracy"})
