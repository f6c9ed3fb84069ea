"""Controls before their scripts are there: the same size and words as the ones that take their place (assets/visit/first.css).

Switches, choices and text fields work already (assets/visit/1-first.js keeps what was chosen and hands it over); a list that opens does
not, and shows its value.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from html import escape
from typing import Any

Props = Mapping[str, Any]
Inner = Callable[[Any], str]
_VOID = {"img", "br", "hr", "input"}


def tag(name: str, attributes: Mapping[str, str | bool], inner: str = "") -> str:
    """An element; `inner` is HTML, attribute values are escaped here, True is an attribute without a value, False and '' none at all."""
    words = [name]
    for key, value in attributes.items():
        if value is True:
            words.append(key)
        elif value is not False and value != "":
            words.append(f'{key}="{escape(value)}"')
    start = " ".join(words)
    return f"<{start}>" if name in _VOID else f"<{start}>{inner}</{name}>"


def _id(props: Props) -> str:
    return str(props.get("id", ""))


def _options(props: Props) -> dict[str, str]:
    """Value -> label of a list, groups opened."""
    out: dict[str, str] = {}
    for one in props.get("data") or []:
        if isinstance(one, dict) and "items" in one:
            out |= _options({"data": one["items"]})
        elif isinstance(one, dict):
            out[str(one["value"])] = str(one.get("label", one["value"]))
        else:
            out[str(one)] = str(one)
    return out


def _framed(props: Props, control: str) -> str:
    """With the label and the description that some controls have above them."""
    parts = [
        tag("div", {"class": f"st-{name}"}, escape(str(props[name])))
        for name in ("label", "description")
        if isinstance(props.get(name), str)
    ]
    style = f"width:{props['w']}px" if isinstance(props.get("w"), int) else ""
    return tag("div", {"class": f"st-field {props.get('className', '')}".strip(), "style": style}, "".join(parts) + control)


def _size(props: Props) -> str:
    return f"st-{props.get('size', 'sm')}"


def segments(props: Props, inner: Inner) -> str:
    """One of a few values."""
    chosen, name = str(props.get("value")), _id(props)
    labels = [
        tag(
            "label",
            {"class": "st-on" if value == chosen else ""},
            tag("input", {"type": "radio", "name": f"first-{name}", "data-first": name, "value": value, "checked": value == chosen})
            + escape(text),
        )
        for value, text in _options(props).items()
    ]
    return tag("div", {"class": f"st-segments {_size(props)}", "role": "radiogroup"}, "".join(labels))


def switch(props: Props, inner: Inner) -> str:
    """On or off."""
    box = tag("input", {"type": "checkbox", "role": "switch", "data-first": _id(props), "checked": bool(props.get("checked"))})
    return tag("label", {"class": f"st-switch {_size(props)}"}, box + tag("i", {}) + tag("span", {}, escape(str(props.get("label", "")))))


def select(props: Props, inner: Inner) -> str:
    """One of a list."""
    value = props.get("value")
    shown = "" if value is None else _options(props).get(str(value), str(value))
    field = tag(
        "input",
        {
            "class": f"st-input st-list {_size(props)}",
            "readonly": True,
            "value": shown,
            "placeholder": str(props.get("placeholder", "")),
            "aria-label": str(props.get("aria-label", "")),
        },
    )
    return _framed(props, field)


def several(props: Props, inner: Inner) -> str:
    """Several of a list."""
    options = _options(props)
    pills = "".join(tag("span", {"class": "st-pill"}, escape(options.get(str(one), str(one)))) for one in props.get("value") or [])
    return _framed(props, tag("div", {"class": f"st-input st-list {_size(props)}"}, pills))


def text(props: Props, inner: Inner) -> str:
    """A field to type in."""
    value = "" if props.get("value") is None else str(props["value"])
    field = tag(
        "input",
        {
            "class": f"st-input {_size(props)}",
            "data-first": _id(props),
            "value": value,
            "placeholder": str(props.get("placeholder", "")),
            "aria-label": str(props.get("aria-label", "")),
        },
    )
    return _framed(props, field)


def area(props: Props, inner: Inner) -> str:
    """A text of several lines."""
    value = str(props.get("value") or "")
    field = tag("textarea", {"class": "st-input st-area", "rows": str(props.get("minRows", 3)), "data-first": _id(props)}, escape(value))
    return _framed(props, field)


def number(props: Props, inner: Inner) -> str:
    """A number, shown."""
    return _framed(props, tag("input", {"class": f"st-input {_size(props)}", "readonly": True, "value": str(props.get("value", ""))}))


def chip(props: Props, inner: Inner) -> str:
    """One chip of a group."""
    return tag("span", {"class": "st-chip"}, inner(props.get("children")))


def group(props: Props, inner: Inner) -> str:
    """A group of chips."""
    return inner(props.get("children"))


def button(props: Props, inner: Inner) -> str:
    """A button that needs the application."""
    kind = "st-button" if props.get("variant", "filled") == "filled" else "st-button st-quiet"
    return tag("span", {"class": f"{kind} {_size(props)}"}, inner(props.get("children")))


def scheme(props: Props, inner: Inner) -> str:
    """Light or dark."""
    shown = (("st-when-light", "lightIcon"), ("st-when-dark", "darkIcon"))
    icons = "".join(tag("span", {"class": name}, inner(props.get(icon))) for name, icon in shown)
    attributes: dict[str, str | bool] = {"type": "button", "class": "st-scheme", "data-scheme": "flip"}
    return tag("button", attributes | {"aria-label": str(props.get("aria-label", ""))}, icons)


def pages(props: Props, inner: Inner) -> str:
    """The pages of a text."""
    return "" if props.get("display") == "none" else tag("div", {"class": "st-pages"})


def slider(props: Props, inner: Inner) -> str:
    """A slider's place."""
    return tag("div", {"class": "st-slider"})


DRAWN: dict[str, Callable[[Props, Inner], str]] = {
    "Button": button,
    "Checkbox": switch,
    "Chip": chip,
    "ChipGroup": group,
    "ColorSchemeToggle": scheme,
    "MultiSelect": several,
    "NumberInput": number,
    "Pagination": pages,
    "Progress": slider,
    "SegmentedControl": segments,
    "Select": select,
    "Slider": slider,
    "Switch": switch,
    "TextInput": text,
    "Textarea": area,
}
