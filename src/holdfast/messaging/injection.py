"""Injection: what a handler may ask for, and the reading of what one asks for, done once when its listener is built.

Each parameter says by its annotation what it is to be given. One of them is the body: the one whose class is not
injectable. Injectable are `Message`, `Delivery`, `Tx`, `Clock`, and the keys of the listener's `provide`. `X | None`
counts as `X`. A parameter with a default that cannot be injected keeps its default.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, Generic, Literal, Union, get_args, get_origin, get_type_hints

import msgspec

from holdfast.clock import Clock
from holdfast.db.database import Tx
from holdfast.errors import InvalidInput
from holdfast.messaging.bodies import kind_of
from holdfast.messaging.message import Delivery, Message, Settlement

if TYPE_CHECKING:
    from typing_extensions import TypeVar

    B = TypeVar("B", default=Any)
else:
    from typing import TypeVar

    B = TypeVar("B")

Handler = Callable[..., Awaitable[Any]]
Source = Literal["body", "incoming", "delivery", "message", "tx", "fixed", "opened"]


class Incoming(msgspec.Struct, Generic[B], frozen=True, kw_only=True):
    """A message as a whole: the decoded body, the delivery, and the way to settle it in manual mode."""

    body: B
    delivery: Delivery
    settle: Callable[[Settlement], Awaitable[None]]


class PerMessage(msgspec.Struct, frozen=True):
    """A dependency that is opened anew for each call of a handler, as in `PerMessage(sessions.begin)`.

    `factory` takes nothing and gives an async context manager: entered before the call, left after it, with the error
    if the handler failed. What it is entered as is what the handler gets. A batch is one call.
    """

    factory: Callable[[], AbstractAsyncContextManager[Any]]

    def __post_init__(self) -> None:
        if not callable(self.factory):
            raise InvalidInput(
                "PerMessage takes a function that gives a new async context manager for each call, not "
                f"{type(self.factory).__name__}; write PerMessage(sessions.begin), without brackets after begin"
            )
        if inspect.iscoroutinefunction(self.factory) or inspect.isasyncgenfunction(self.factory):
            raise InvalidInput(
                f"PerMessage: {name_of(self.factory)} gives no context manager; decorate it with "
                "contextlib.asynccontextmanager and let it yield once"
            )


class Want(msgspec.Struct, frozen=True, kw_only=True):
    """What one parameter is to be given."""

    name: str
    source: Source
    by_name: bool
    value: Any = None  # of "fixed" the value itself, of "opened" its PerMessage


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What a handler asks for: the classes of its body, whether it takes a batch, and its parameters in their order."""

    place: str  # the beginning of every complaint about it
    handler: str
    types: tuple[type, ...]
    many: bool
    wants: tuple[Want, ...]

    @property
    def effect(self) -> bool:
        """Whether it runs in a transaction."""
        return any(want.source == "tx" for want in self.wants)


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    types: tuple[type, ...]
    many: bool
    whole: bool  # asked for as Incoming


OWN: Mapping[type, Source] = {Message: "message", Delivery: "delivery", Tx: "tx"}
ASKABLE = "Message, Delivery, Tx, Clock"
BATCHES = (list, Sequence)


def check_provide(listener: str, provide: Mapping[Any, Any]) -> None:
    """Raise `InvalidInput` for a key that is not the user's to give, and for a class or function as an instance."""
    for key, value in provide.items():
        if key in (*OWN, Clock, Incoming):
            raise InvalidInput(
                f"listener {listener!r}: provide: {shown(key)} comes from the listener itself; take it out"
            )
        if isinstance(key, type) and (isinstance(value, type) or inspect.isroutine(value)) and not _called(key):
            what = "class" if isinstance(value, type) else "function"
            raise InvalidInput(
                f"listener {listener!r}: provide: {shown(key)} is given the {what} {name_of(value)}; give an instance, "
                f"or PerMessage({value.__name__}) for one that is opened for each call"
            )


def _called(kind: type) -> bool:
    """Whether what is of this class is called, so that a function or a class may be one."""
    return any("__call__" in vars(each) for each in kind.__mro__)


def read_handler(listener: str, handler: Handler, provide: Mapping[Any, Any], clock: Clock) -> Asked:
    """Read the parameters of a handler; raises `InvalidInput` that says which one is wrong and what to do."""
    name = name_of(handler)
    place = f"listener {listener!r}, handler {name}"
    function, given = _function_of(place, handler)
    offers = {**dict.fromkeys(OWN), **provide, Clock: clock}
    wants: list[Want] = []
    candidates: dict[str, Any] = {}  # parameters that may be the body -> their annotation
    batches: dict[str, bool] = {}  # parameters asking for Message or Delivery -> whether for several
    gap = False  # one before it is not given by position, so it cannot be either
    for each in inspect.signature(handler).parameters.values():
        parameter = f"{place}: parameter {each.name!r}"
        if each.kind in (each.VAR_POSITIONAL, each.VAR_KEYWORD):
            raise InvalidInput(f"{parameter} takes whatever comes; write out what the handler needs")
        annotation = None if each.name in given else _hint(parameter, function, each)
        offered, many = (None, False) if annotation is None else _offer(annotation, offers)
        by_name = each.kind is each.KEYWORD_ONLY or (each.kind is each.POSITIONAL_OR_KEYWORD and gap)
        if offered is not None:
            want = _injected(each, by_name, offered, offers)
            if want.source in ("message", "delivery"):
                batches[each.name] = many
        elif each.default is each.empty:
            candidates[each.name] = annotation
            want = Want(name=each.name, source="body", by_name=by_name)
        elif each.kind is each.POSITIONAL_ONLY:  # what follows is given by position, so this must be too
            want = Want(name=each.name, source="fixed", by_name=False, value=each.default)
        else:
            gap = True
            continue
        gap = gap or (want.source == "fixed" and want.by_name)
        wants.append(want)
    body = _the_body(place, candidates)
    _check_shape(place, body, wants, batches)
    if body.whole:
        wants = [msgspec.structs.replace(each, source="incoming") if each.source == "body" else each for each in wants]
    return Asked(place=place, handler=name, types=body.types, many=body.many, wants=tuple(wants))


def name_of(handler: Any) -> str:
    """How a handler is called in a sentence."""
    while isinstance(handler, functools.partial):
        handler = handler.func
    return str(getattr(handler, "__qualname__", type(handler).__qualname__))


def shown(annotation: Any) -> str:
    """How a class or an annotation is called in a sentence."""
    return annotation.__qualname__ if isinstance(annotation, type) else str(annotation).replace("typing.", "")


# -- parameters --------------------------------------------------------------------------------------------------------


def _function_of(place: str, handler: Any) -> tuple[Any, frozenset[str]]:
    """The function that holds the annotations, and the parameters that a partial has given already."""
    given: set[str] = set()
    while isinstance(handler, functools.partial):
        given |= handler.keywords.keys()
        handler = handler.func
    if isinstance(handler, type):
        raise InvalidInput(f"{place} is a class; give an instance of it or one of its methods")
    function = handler if inspect.isroutine(handler) else getattr(type(handler), "__call__", None)  # noqa: B004
    if not inspect.iscoroutinefunction(function):
        raise InvalidInput(f"{place} is no coroutine function; write it with `async def` and without `yield`")
    return inspect.unwrap(function), frozenset(given)


def _hint(parameter: str, function: Any, each: inspect.Parameter) -> Any:
    """The parameter's annotation, with its names looked up in the function's module; None for a default without one."""
    if each.annotation is each.empty:
        if each.default is not each.empty:
            return None
        hint = " (a method is given bound to its object: instance.method)" if each.name == "self" else ""
        raise InvalidInput(
            f"{parameter} has no annotation; annotate it with the class of the body, {ASKABLE} or a class of "
            f"`provide`{hint}"
        )
    alone = types.SimpleNamespace(__annotations__={each.name: each.annotation})
    try:
        hint = get_type_hints(alone, function.__globals__)[each.name]
    except NameError as error:
        raise InvalidInput(
            f"{parameter} is annotated {each.annotation!r}, and {error.name!r} is no name of the module "
            f"{function.__module__}; define the class at the top of a module, not inside a function, and import it "
            "there, not under TYPE_CHECKING"
        ) from None
    except Exception as error:
        raise InvalidInput(f"{parameter} is annotated {each.annotation!r}, which cannot be read: {error}") from None
    return _unaliased(hint)


def _unaliased(annotation: Any) -> Any:
    """What stands behind a `type X = ...`; that statement is younger than the oldest Python we run on."""
    while type(annotation).__name__ == "TypeAliasType":
        annotation = annotation.__value__
    return annotation


def _offer(annotation: Any, offers: Mapping[Any, Any]) -> tuple[Any, bool]:
    """What is injected for the annotation (None for nothing), and whether a batch of it."""
    if _is_union(annotation):
        rest = [each for each in get_args(annotation) if each is not type(None)]
        annotation = rest[0] if len(rest) == 1 else annotation
    try:
        if annotation in offers:
            return annotation, False
    except TypeError:  # an annotation that cannot be a key
        return None, False
    if get_origin(annotation) in BATCHES and get_args(annotation) in ((Message,), (Delivery,)):
        return get_args(annotation)[0], True
    return None, False


def _injected(each: inspect.Parameter, by_name: bool, offered: Any, offers: Mapping[Any, Any]) -> Want:
    if offered in OWN:
        return Want(name=each.name, source=OWN[offered], by_name=by_name)
    value = offers[offered]
    if isinstance(value, PerMessage):
        return Want(name=each.name, source="opened", by_name=by_name, value=value)
    # What is the same for every call is given by name wherever that is possible, so that it can be bound beforehand.
    return Want(name=each.name, source="fixed", by_name=each.kind is not each.POSITIONAL_ONLY, value=value)


def _check_shape(place: str, body: _Body, wants: Sequence[Want], batches: Mapping[str, bool]) -> None:
    for want in wants:
        if want.name in batches and batches[want.name] != body.many:
            one = want.source.capitalize()
            raise InvalidInput(
                f"{place}: parameter {want.name!r}: its body is a batch, so write Sequence[{one}]"
                if body.many
                else f"{place}: parameter {want.name!r}: its body is no batch, so write {one}"
            )
        if want.source == "tx" and body.whole:
            raise InvalidInput(
                f"{place}: parameter {want.name!r}: what runs in a transaction is settled by it, so take the body "
                "itself and not Incoming; Delivery and Message may be asked for too"
            )


# -- the body ----------------------------------------------------------------------------------------------------------


def _the_body(place: str, candidates: Mapping[str, Any]) -> _Body:
    """The one parameter that is the body."""
    if not candidates:
        raise InvalidInput(
            f"{place} has no parameter for the body; add one without a default, annotated with the class of the body"
        )
    fits: dict[str, _Body] = {}
    unfit: dict[str, str] = {}
    for name, annotation in candidates.items():
        read = _body_of(annotation)
        if isinstance(read, str):
            unfit[name] = read
        else:
            fits[name] = read
    if len(fits) > 1:
        first, second = list(fits)[:2]
        raise InvalidInput(
            f"{place}: parameters {first!r} and {second!r} could both be the body, and one may be; "
            f"add {shown(candidates[second])} to the listener's `provide`, or give the parameter a default"
        )
    if not fits:
        name, why = next(iter(unfit.items()))
        raise InvalidInput(f"{place}: no parameter is the body; {name!r} is none, and nobody provides it: {why}")
    for name in unfit:
        raise InvalidInput(
            f"{place}: parameter {name!r}: nobody provides {shown(candidates[name])}; add it to the listener's "
            f"`provide`, or give the parameter a default ({ASKABLE} need no `provide`)"
        )
    return next(iter(fits.values()))


def _body_of(annotation: Any) -> _Body | str:
    """The annotation as that of a body, or why it is none."""
    many = get_origin(annotation) in BATCHES and get_args(annotation) != ()
    inner = _unaliased(get_args(annotation)[0]) if many else annotation
    whole = get_origin(inner) is Incoming
    if whole:
        inner = _unaliased(get_args(inner)[0])
    if inner is Incoming or inner is Sequence or get_origin(inner) is Sequence:
        return f"write {shown(get_origin(inner) or inner)}[X] with the class X of the body"
    found = []
    for each in get_args(inner) if _is_union(inner) else (inner,):
        # dict[str, Any] is a dict, since JSON objects have no other class; a list[X] on its own is a batch.
        plain = get_origin(each) if get_origin(each) in ((dict, list) if many or whole else (dict,)) else each
        if plain is Any or not isinstance(plain, type):
            hint = "; one body that is a list is written `list`, without brackets" if many else ""
            return f"{shown(each)} is not the class of a body{hint}"
        try:
            kind_of(plain)
        except InvalidInput as error:
            return error.detail
        found.append(plain)
    return _Body(types=tuple(dict.fromkeys(found)), many=many, whole=whole)


def _is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, types.UnionType)
