"""The Dash application with two things of our own: the document that is sent first, and callbacks that check what they are sent.

A callback's body is written by whoever can reach the server. Dash hands its values to the function as they came, so a list where a name
belongs ended as a TypeError deep inside, a 500 and a traceback in the log. Here every function is wrapped by the types that it declares:
what does not fit is answered 400 before anything runs, and a defect of ours still is a 500.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, get_type_hints

import dash
import flask
import werkzeug.exceptions
from pydantic import BaseModel, Field, TypeAdapter, ValidationError

from headscope.app import first_paint

_ROUTER: dict[str, Any] = {"pathname_": Annotated[str, Field(pattern="^/")], "search_": str | None}
"""What the router of Dash's pages, which declares nothing, is sent."""


class Dashboard(dash.Dash):
    """`dash.Dash` with the first paint (see `first_paint`) and typed callbacks."""

    def interpolate_index(
        self,
        metas: str = "",
        title: str = "",
        css: str = "",
        config: str = "",
        scripts: str = "",
        app_entry: str = "",
        favicon: str = "",
        renderer: str = "",
    ) -> str:
        """The document of a request."""
        parts = {"metas": metas, "title": title, "css": css, "config": config, "scripts": scripts}
        return first_paint.document(self, {**parts, "app_entry": app_entry, "favicon": favicon, "renderer": renderer})

    def callback(self, *args: Any, **kwargs: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """As in Dash; the function is only called with values of the types that it declares."""
        register = super().callback(*args, **kwargs)
        return lambda function: register(typed(function))


def typed(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function behind a check of its arguments: BadRequest for one that is not what the signature says."""
    hints = {**_ROUTER, **get_type_hints(function, include_extras=True)}
    names = list(inspect.signature(function).parameters)
    checks = {name: TypeAdapter(hints.get(name, Any)) for name in names}

    @functools.wraps(function)
    def checked(*args: Any, **kwargs: Any) -> Any:
        for name, value in (*zip(names, args, strict=False), *kwargs.items()):
            if name in checks:
                _check(checks[name], value, name.strip("_"))
        return function(*args, **kwargs)

    return checked


class _Property(BaseModel):
    id: str | dict[str, Any]
    property: str


class _Body(BaseModel):
    output: str
    inputs: list[_Property | list[_Property]] = []
    state: list[_Property | list[_Property]] = []
    outputs: _Property | list[_Property | list[_Property]] = []
    changedPropIds: list[str] = []


_BODY = TypeAdapter(_Body)


def install(app: dash.Dash) -> None:
    """Refuses bodies that are no callback of this application."""

    @app.server.before_request
    def check() -> None:
        request = flask.request
        if not request.path.endswith("/_dash-update-component") or not request.is_json:
            return
        body = request.get_json()
        _check(_BODY, body, "body")
        known = app.callback_map.get(body["output"])
        if known is None:
            raise werkzeug.exceptions.BadRequest("output: there is no such callback")
        for name, part in (("inputs", "inputs"), ("state", "state")):
            if len(body.get(name, [])) != len(known[part]):
                raise werkzeug.exceptions.BadRequest(f"{name}: this callback has {len(known[part])}")


def _check(adapter: TypeAdapter[Any], value: Any, name: str) -> None:
    try:
        adapter.validate_python(value, strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(str(part) for part in (name, *first["loc"]))
        raise werkzeug.exceptions.BadRequest(f"{place}: {first['msg']}") from error
