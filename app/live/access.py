"""The model of the application that answers this request, if it has one."""

from __future__ import annotations

import flask

from headscope.app.live.owner import ModelOwner

_KEY = "headscope.model"


def bind(server: flask.Flask, owner: ModelOwner | None) -> None:
    """Gives an application its model, or none."""
    server.extensions[_KEY] = owner


def owner() -> ModelOwner | None:
    """The owner of the model of this application."""
    found = flask.current_app.extensions.get(_KEY)
    return found if isinstance(found, ModelOwner) else None
