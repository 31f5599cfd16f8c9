"""Calls in other libraries' words are errors that give the line to write here; the line works."""

import copy
import re

import pytest
import torch
from conftest import points
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
        "Pass callbacks=[minikeras.EarlyStopping(monitor, patience=5)]. Write model.fit(3, dl_train, dl_val=dl_val).",
    ),
    "validation_split": (lambda m: m.fit(2, (X, y), validation_split=0.2), "Split the rows before"),
    "class_weight": (lambda m: m.fit(2, (X, y), class_weight={0: 1.0}), "nn.CrossEntropyLoss(weight=...)"),
    "shuffle": (lambda m: m.fit(2, (X, y), shuffle=False), "DataLoader(TensorDataset(X, y), batch_size=32)"),
    "initial_epoch": (lambda m: m.fit(2, (X, y), initial_epoch=3), "continue from the history"),
    "nb_epoch": (lambda m: m.fit((X, y), nb_epoch=3), "Write model.fit(3, (X, y))."),
    "ckpt_path": (lambda m: m.fit(2, LOADER, ckpt_path="a.pt"), "minikeras.ModelCheckpoint(path)"),
    "a misspelt argument": (lambda m: m.fit(2, (X, y), batchsize=3), "Did you mean 'batch_size'?"),
    "compile of names": (
        lambda m: m.compile(optimizer="adam", loss="mse", metrics=["mae"]),
        "Write model.compile(nn.MSELoss(), torch.optim.Adam(model.parameters(), lr=1e-3), "
        'metrics_dict={"mae": nn.L1Loss()}).',
    ),
    "evaluate(X, y)": (lambda m: m.evaluate(X, y), "Write model.evaluate((X, y))."),
    "predict(X, 64)": (lambda m: m.predict(X, 64), "Write model.predict(X, batch_size=64)."),
    "predict(verbose=)": (lambda m: m.predict(X, verbose=0), "predict prints nothing. Write model.predict(X)."),
}


@pytest.mark.parametrize(("call", "message"), CALLS.values(), ids=CALLS)
def test_a_call_in_other_words_gives_the_line_and_the_line_works(call, message):
    made = model()
    with pytest.raises(TypeError, match=re.escape(message)) as raised:
        call(made)
    line = re.search(r"Write (model\..*)\.$", str(raised.value))[1]
    names = {"X": X, "y": y, "X_val": X, "y_val": y, "dl_train": LOADER, "dl_val": LOADER}
    eval(line, names | {"model": made, "nn": nn, "torch": torch})


def test_the_names_of_other_libraries_say_the_one_here():
    for name in ("KerasModel", "LightModel"):
        with pytest.raises(AttributeError, match=r"Here it is minikeras\.Model"):
            getattr(minikeras, name)
    assert not hasattr(minikeras, "nothing")


def test_history_and_optimizer_say_compile_where_they_are_missing():
    for made in (minikeras.Model(nn.Linear(2, 1)), copy.deepcopy(model())):
        for name in ("history", "optimizer"):
            with pytest.raises(AttributeError, match=rf"has no {name}.*Call model\.compile"):
                getattr(made, name)
            assert not hasattr(made, name)
        made.compile(nn.MSELoss(), device="cpu")
        assert len(made.history) == 0
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        model().nothing  # noqa: B018


@pytest.mark.parametrize("data", [torch.rand(4, 3, 8, 8), torch.rand(4, 3, 8, 8).numpy()], ids=["tensor", "array"])
def test_a_batch_given_to_summary_as_a_shape_is_told_in_one_line(data, capsys):
    net = nn.Conv2d(3, 8, 3)
    for call in (lambda: minikeras.summary(net, data), lambda: minikeras.Model(net).summary(data)):
        with pytest.raises(ValueError, match=r"of shape \(4, 3, 8, 8\).*summary\(net, input_data=batch\)") as raised:
            call()
        assert "\n" not in str(raised.value)
    minikeras.summary(net, input_data=torch.as_tensor(data))
    minikeras.summary(net, (3, 8, 8))


def test_the_name_of_a_loss_says_the_object():
    made = minikeras.Model(nn.Linear(2, 1))
    with pytest.raises(TypeError, match=r"got 'mae'\. Names stand for nothing here: pass for instance nn\.L1Loss\(\)"):
        made.compile("mae", torch.optim.Adam(made.parameters()))
    with pytest.raises(TypeError, match=r"got 'adam'.*the optimizer comes second"):
        made.compile("adam", "mse")
