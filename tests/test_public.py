import importlib
import inspect
import pkgutil

import pytest

import keras_tbptt

MODULES = [m.name for m in pkgutil.iter_modules(keras_tbptt.__path__, "keras_tbptt.")]


def public_callables():
    for name in MODULES:
        module = importlib.import_module(name)
        for attribute, value in vars(module).items():
            if attribute.startswith("_") or getattr(value, "__module__", None) != name:
                continue
            if inspect.isclass(value):
                yield f"{name}.{attribute}", value, vars(value).get("__init__", lambda: None)
                for method, function in vars(value).items():
                    if not method.startswith("_") and inspect.isfunction(function):
                        yield f"{name}.{attribute}.{method}", function, function
            elif inspect.isfunction(value):
                yield f"{name}.{attribute}", value, value


@pytest.mark.parametrize(
    ("documented", "function"),
    [pytest.param(d, f, id=name) for name, d, f in public_callables()],
)
def test_every_public_name_says_what_it_takes(documented, function):
    doc = inspect.getdoc(documented)
    assert doc and doc.split("\n")[0].endswith((".", "`")), "a summary in one line"
    if "Attributes:" in doc or function.__qualname__.split(".")[-1].startswith("on_"):
        return  # a record of named fields; one of Keras's hooks, which Keras documents
    for name in list(inspect.signature(function).parameters):
        if name != "self":
            assert f"    {name}:" in doc.replace("*", ""), f"`{name}` is not described"


def test_the_public_names_are_all_there():
    for name in keras_tbptt.__all__:
        assert getattr(keras_tbptt, name).__doc__
