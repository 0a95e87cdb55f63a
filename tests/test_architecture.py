"""The house's rules as checks: who may import whom, who may look at the clock, how long a function may be."""

from __future__ import annotations

import ast
import pkgutil
import re
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path

import pytest

import holdfast
from holdfast import errors
from holdfast.errors import HoldfastError

SRC = Path(holdfast.__file__).parent

# --- The tables -------------------------------------------------------------------------------------------------------

ROOMS: dict[str, int] = {
    "errors": 0,
    "clock": 0,
    "deadline": 0,
    "ids": 0,
    "settings": 0,
    "observe": 0,
    "db": 1,
    "messaging": 2,
    "services": 3,
    "bootstrap": 4,
    "audit": 4,
    "edge": 5,
    "__main__": 6,
}
"""A module may import its own room and the rooms of a lower number; modules of one number ignore each other, except
that the foundations (number 0) may use one another without a cycle."""

PUBLIC_NAMES_REACH = 2
"""`holdfast/__init__.py` offers the toolkit: up to messaging, nothing of the order engine."""

SHARED_BY_SERVICES = frozenset({"contracts", "schema", "sweeper"})

SERVICE_RANKS: dict[str, int] = {
    "model": 0,
    "needs": 1,
    "store": 1,
    "place": 2,
    "actions": 2,
    "sandbox_book": 2,
    "sandbox": 3,
    "sandbox_remote": 4,
    "alipay_signing": 1,
    "alipay_wire": 2,
    "alipay_account": 2,
    "alipay_bill": 3,
    "alipay": 4,
    "transitions": 3,
    "service": 4,
    "listeners": 5,
}
"""Inside a service a module imports only modules of a lower rank; a new kind of module needs a rank here."""

LAZY_IMPORTERS = frozenset(
    {
        "holdfast.messaging.transports.registry",
        "holdfast.bootstrap",
        "holdfast.edge.cli",
        "holdfast.edge.queues_cli",
    }
)
"""Who may call import_module: libraries of an extra stay optional, and a user may name a module of his own."""

CLOCK_MODULES = ("holdfast.clock", "holdfast.deadline")
SOCKETS_IN = "holdfast.edge.http.connection"  # time-outs of a socket run on its loop, as uvicorn's own do
CLOCKS = frozenset(
    {
        *(f"time.{name}" for name in ("time", "time_ns", "monotonic", "monotonic_ns", "sleep")),
        *(f"time.{name}" for name in ("perf_counter", "perf_counter_ns", "localtime", "gmtime")),
        *(f"datetime.datetime.{name}" for name in ("now", "utcnow", "today")),
        "datetime.date.today",
        "asyncio.sleep",
    }
)
LOOP_CALLS = frozenset({"get_running_loop", "get_event_loop", "new_event_loop"})
LOOP_TIMERS = frozenset({"time", "call_later", "call_at"})

FORBIDDEN_CALLS = frozenset({"eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load"})
FORBIDDEN_IMPORTS = frozenset({"pickle", "cPickle", "dill", "marshal", "shelve", "jsonpickle"})

SQL_CALLS = frozenset({"text", "execute", "exec_driver_sql", "executemany", "executescript", "scalars", "scalar"})
PRAGMAS_IN = "holdfast.db.sqlite"  # a PRAGMA takes no parameter; its constants stand one line above

FUNCTION_LINES_MAX = 60
FILE_LINES_MAX = 450
MIGRATIONS = "/migrations/versions/"  # generated lists of columns, not code that is read top to bottom


# --- Reading the source -----------------------------------------------------------------------------------------------


def sources() -> dict[str, str]:
    """Module name -> text, of everything in src except migrations."""
    found = {}
    for path in sorted(SRC.rglob("*.py")):
        if MIGRATIONS not in path.as_posix():
            parts = ("holdfast", *path.relative_to(SRC).with_suffix("").parts)
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path.read_text(encoding="utf-8")
    return found


ALL = sources()


def imports_of(module: str, text: str, known: frozenset[str]) -> set[str]:
    """The modules of ours that the text imports, at whatever depth; relative imports are resolved."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "holdfast"}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                package = module if module + ".x" in known else module.rpartition(".")[0]
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *([base] if base else [])])
            if base.split(".")[0] == "holdfast":
                for alias in node.names:
                    full = f"{base}.{alias.name}"
                    found.add(full if full in known else base)
    return found - {module}


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else "holdfast"


def within(module: str, *folder: str) -> tuple[str, ...] | None:
    """What follows after the folder in the module's name; None when the module is not in it."""
    parts = tuple(module.split("."))[1:]
    return parts[len(folder) :] if parts[: len(folder)] == folder and len(parts) > len(folder) else None


def import_faults(module: str, imported: str) -> str | None:
    """Why the module must not import the other one, or None when it may."""
    importer_room, imported_room = room_of(module), room_of(imported)
    if imported == "holdfast":
        return "takes from the public names, which would be a cycle"
    if imported_room not in ROOMS:
        return f"{imported_room} has no place in ROOMS"
    reach = PUBLIC_NAMES_REACH if module == "holdfast" else ROOMS.get(importer_room)
    if reach is None:
        return f"{importer_room} has no place in ROOMS"
    same_number = importer_room != imported_room and reach == ROOMS[imported_room] and reach != 0
    if ROOMS[imported_room] > reach or (same_number and module != "holdfast"):
        return f"{importer_room} must not import {imported_room}"
    return _transport_fault(module, imported) or _service_fault(module, imported)


def _transport_fault(module: str, imported: str) -> str | None:
    ours, theirs = within(module, "messaging", "transports"), within(imported, "messaging", "transports")
    if ours and theirs and len(ours) > 1 and ours[0] != theirs[0]:
        return f"transport {ours[0]} must not import {theirs[0]}"
    return None


def _service_fault(module: str, imported: str) -> str | None:
    ours, theirs = within(module, "services"), within(imported, "services")
    if not ours or not theirs:
        return None
    if theirs[0] in SHARED_BY_SERVICES:
        return None if ours[0] not in SHARED_BY_SERVICES or ours[0] == theirs[0] else "shared parts stand alone"
    if ours[0] != theirs[0]:
        return f"service {ours[0]} must not import {theirs[0]}"
    if len(ours) < 2 or len(theirs) < 2:
        return None
    for name in (ours[1], theirs[1]):
        if name not in SERVICE_RANKS:
            return f"{name} has no place in SERVICE_RANKS"
    if ours[1] != theirs[1] and SERVICE_RANKS[theirs[1]] >= SERVICE_RANKS[ours[1]]:
        return f"{ours[1]} must not import {theirs[1]}"
    return None


def faults_in(module: str, text: str, known: frozenset[str]) -> list[str]:
    reasons = {imported: import_faults(module, imported) for imported in sorted(imports_of(module, text, known))}
    return [f"{module} -> {imported}: {why}" for imported, why in reasons.items() if why]


# --- (a) imports ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", sorted(ALL))
def test_each_module_imports_only_what_stands_to_its_left(module: str) -> None:
    assert faults_in(module, ALL[module], frozenset(ALL)) == []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("holdfast.db.sql", "from holdfast.messaging.outbox import Outbox"),
        ("holdfast.db.sql", "def f():\n    import holdfast.services.orders.model"),
        ("holdfast.messaging.inbox", "from holdfast.services.contracts import events"),
        ("holdfast.messaging.inbox", "from ..services.contracts import events"),
        ("holdfast.services.orders.store", "from holdfast.edge import cli"),
        ("holdfast.services.orders.store", "from holdfast import bootstrap"),
        ("holdfast.services.orders.place", "from holdfast.services.stock.model import Level"),
        ("holdfast.services.orders.place", "from holdfast.services import stock"),
        ("holdfast.services.orders.model", "from holdfast.services.orders import store"),
        ("holdfast.services.orders.place", "from holdfast.services.orders.transitions import Transitions"),
        ("holdfast.services.orders.service", "from holdfast.services.orders.listeners import listeners"),
        ("holdfast.services.orders.place", "from holdfast.services.orders.tricks import trick"),
        ("holdfast.services.contracts.events", "from holdfast.services.schema import metadata"),
        ("holdfast.services.contracts.events", "from holdfast.services.orders.model import EDGES"),
        ("holdfast.audit", "from holdfast.bootstrap import running"),
        ("holdfast.errors", "from holdfast.db.database import Tx"),
        ("holdfast.clock", "from holdfast import Publisher"),
        ("holdfast", "from holdfast.services.orders.service import OrderService"),
        ("holdfast.messaging.transports.rabbitmq.wire", "from holdfast.messaging.transports.sql import notify"),
        ("holdfast.cellar", "from holdfast.errors import Refused"),
        ("holdfast.errors", "import holdfast.cellar"),
    ],
)
def test_the_import_check_detects(module: str, text: str) -> None:
    known = frozenset({*ALL, "holdfast.services.orders.tricks", "holdfast.edge.cli", "holdfast.cellar"})
    assert faults_in(module, text, known) != []


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("holdfast.db.sql", "import os\nfrom holdfast import observe\nfrom holdfast.errors import Refused"),
        ("holdfast", "from holdfast.messaging.outbox import Outbox\nfrom holdfast.errors import Refused"),
        ("holdfast.services.orders.place", "from holdfast.services.contracts import events"),
        ("holdfast.services.orders.service", "from . import store\nfrom .place import PlaceOrders"),
        ("holdfast.messaging.transports.registry", "from holdfast.messaging.transports.sql import notify"),
        ("holdfast.edge.cli", "from holdfast.audit import audit\nfrom holdfast.bootstrap import running"),
    ],
)
def test_the_import_check_lets_pass(module: str, text: str) -> None:
    assert faults_in(module, text, frozenset({*ALL, "holdfast.edge.cli"})) == []


def cycle_in(graph: dict[str, set[str]]) -> list[str]:
    """One cycle of the graph, or nothing."""
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node not in done:
            for neighbour in sorted(graph.get(node, ())):
                if found := walk(neighbour, [*path, node]):
                    return found
            done.add(node)
        return []

    for start in sorted(graph):
        if found := walk(start, []):
            return found
    return []


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = frozenset(ALL)
    assert cycle_in({module: imports_of(module, text, known) for module, text in ALL.items()}) == []


def test_the_circle_check_detects() -> None:
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def lazy_imports(module: str, text: str) -> list[str]:
    """Imports inside functions, and calls of import_module and __import__ outside of the registry."""
    found = []
    tree = ast.parse(text)
    names = imported_names(tree)
    for function in ast.walk(tree):
        if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside = [node for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))]
            found += [f"{module}:{node.lineno} imports inside a function" for node in inside]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and module not in LAZY_IMPORTERS:
            name = dotted(node.func, names)
            if name in ("importlib.import_module", "__import__"):
                found.append(f"{module}:{node.lineno} calls {name}")
    return found


def test_nothing_is_imported_inside_functions() -> None:
    assert [fault for module, text in ALL.items() for fault in lazy_imports(module, text)] == []


def test_the_lazy_import_check_detects() -> None:
    assert lazy_imports("m", "async def f():\n    from os import path") == ["m:2 imports inside a function"]
    assert lazy_imports("m", "from importlib import import_module as im\nim('os')") != []
    assert lazy_imports("m", "x = __import__('os')") != []
    assert lazy_imports(min(LAZY_IMPORTERS), "from importlib import import_module\nimport_module('os')") == []


def edge_faults(module: str, text: str) -> list[str]:
    """The edge translates: it has no SQL of its own."""
    found = []
    for node in ast.walk(ast.parse(text)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"{module} -> {name}" for name in names if name.split(".")[0] in ("sqlalchemy", "sqlite3", "asyncpg")]
    return found


def test_the_edge_speaks_no_sql() -> None:
    edge = {module: text for module, text in ALL.items() if room_of(module) == "edge"}
    assert [fault for module, text in edge.items() for fault in edge_faults(module, text)] == []
    assert edge_faults("holdfast.edge.x", "from sqlalchemy import text") != []


# --- (b) clocks -------------------------------------------------------------------------------------------------------


def imported_names(tree: ast.AST) -> dict[str, str]:
    """Name in the module -> what it stands for, e.g. `t` -> `time`, `now` -> `time.time`."""
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                names[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    return names


def dotted(node: ast.expr, names: dict[str, str]) -> str:
    """The full name of `a.b.c`, resolved by the imports; empty when it is something else."""
    if isinstance(node, ast.Name):
        return names.get(node.id, node.id)
    if isinstance(node, ast.Attribute):
        base = dotted(node.value, names)
        return f"{base}.{node.attr}" if base else ""
    return ""


def clock_faults(module: str, text: str) -> list[str]:
    """Every use (also without a call) of a clock or timer that is not ours."""
    tree = ast.parse(text)
    names = imported_names(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, (ast.Name, ast.Attribute)) and dotted(node, names) in CLOCKS:
            found.append(f"{module}:{node.lineno} uses {dotted(node, names)}")
        if isinstance(node, ast.Attribute) and node.attr in LOOP_TIMERS and _is_loop(node.value, names):
            found.append(f"{module}:{node.lineno} uses the loop's {node.attr}")
    return found


def _is_loop(node: ast.expr, names: dict[str, str]) -> bool:
    if isinstance(node, ast.Call):
        return dotted(node.func, names).rpartition(".")[2] in LOOP_CALLS
    return dotted(node, names).rpartition(".")[2] in ("loop", "_loop")


def test_only_the_clock_modules_look_at_a_clock() -> None:
    faults = [fault for name, text in ALL.items() if name not in CLOCK_MODULES for fault in clock_faults(name, text)]
    assert [fault for fault in faults if not re.match(rf"{SOCKETS_IN}:\d+ uses the loop's call_later$", fault)] == []


@pytest.mark.parametrize(
    "text",
    [
        "import time\ntime.time()",
        "import time as t\nt.sleep(1)",
        "from time import monotonic as now\nnow()",
        "import time\nx = time.perf_counter",
        "import datetime\ndatetime.datetime.now()",
        "from datetime import datetime\ndatetime.utcnow()",
        "from datetime import datetime, UTC\nf(default_factory=datetime.now)",
        "from datetime import date\ndate.today()",
        "import asyncio\nasync def f():\n    await asyncio.sleep(0)",
        "from asyncio import sleep\nsleep(1)",
        "import asyncio\nasyncio.get_running_loop().time()",
        "def f(loop):\n    loop.call_later(1, print)",
        "class A:\n    def f(self):\n        return self._loop.time()",
    ],
)
def test_the_clock_check_detects(text: str) -> None:
    assert clock_faults("m", text) != []


def test_the_clock_check_lets_our_clock_and_plain_datetimes_pass() -> None:
    text = (
        "from datetime import datetime, timedelta\nasync def f(self, clock):\n    await self._clock.sleep(1)\n"
        "    return clock.now_us(), clock.monotonic(), datetime(2026, 1, 1).time(), datetime.fromisoformat('x')"
    )
    assert clock_faults("m", text) == []
    for module in CLOCK_MODULES:
        assert clock_faults("m", ALL[module]) != []


# --- (c) code from data -----------------------------------------------------------------------------------------------


def danger_in(module: str, text: str) -> list[str]:
    """Imports and calls that turn data into code or objects."""
    tree = ast.parse(text)
    names = imported_names(tree)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [f"{module}: {one.name}" for one in node.names if one.name.split(".")[0] in FORBIDDEN_IMPORTS]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FORBIDDEN_IMPORTS:
            found.append(f"{module}: {node.module}")
        elif isinstance(node, ast.Call) and dotted(node.func, names) in FORBIDDEN_CALLS:
            found.append(f"{module}:{node.lineno} {dotted(node.func, names)}")
    return found


def test_no_code_is_made_from_data() -> None:
    assert [fault for module, text in ALL.items() for fault in danger_in(module, text)] == []


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from pickle import loads",
        "eval('1')",
        "exec('x = 1')",
        "import yaml as y\ny.load('')",
        "from yaml import load\nload('')",
    ],
)
def test_the_check_for_code_from_data_detects(text: str) -> None:
    assert danger_in("m", text) != []


# --- (d) length -------------------------------------------------------------------------------------------------------


def long_functions(module: str, text: str) -> list[str]:
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            if lines > FUNCTION_LINES_MAX:
                found.append(f"{module}.{node.name}: {lines} lines")
    return found


def test_every_function_fits_on_a_screen() -> None:
    assert [fault for module, text in ALL.items() for fault in long_functions(module, text)] == []
    assert long_functions("m", "def f():\n" + "    x = 1\n" * FUNCTION_LINES_MAX) == ["m.f: 61 lines"]


def test_no_file_is_longer_than_it_can_be_read() -> None:
    lines = {module: len(text.splitlines()) for module, text in ALL.items()}
    assert {module: count for module, count in lines.items() if count > FILE_LINES_MAX} == {}


# --- (e) errors -------------------------------------------------------------------------------------------------------


def error_classes() -> list[type[HoldfastError]]:
    """Every error class of the library, also those of the services and the edge."""
    for module in pkgutil.walk_packages([str(SRC)], "holdfast."):
        if "migrations" not in module.name and not module.name.endswith("__main__"):
            import_module(module.name)

    def below(kind: type[HoldfastError]) -> Iterator[type[HoldfastError]]:
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    found: dict[type[HoldfastError], None] = dict.fromkeys([HoldfastError, *below(HoldfastError)])
    return [kind for kind in found if kind.__module__.split(".")[0] == "holdfast"]


def test_every_error_has_a_code_of_its_own() -> None:
    own = {f"{kind.__module__}.{kind.__name__}": kind.__dict__.get("code") for kind in error_classes()}
    assert [name for name, code in own.items() if not isinstance(code, str)] == []
    by_code: dict[object, list[str]] = {}
    for name, code in own.items():
        by_code.setdefault(code, []).append(name)
    assert {code: names for code, names in by_code.items() if len(names) > 1} == {}
    assert [code for code in by_code if not re.fullmatch(r"[a-z][a-z_]*[a-z]", str(code))] == []


def test_every_error_says_in_one_line_what_it_means() -> None:
    for kind in error_classes():
        first = (kind.__dict__.get("__doc__") or "").strip().splitlines()
        assert first, kind
        assert first[0].endswith("."), f"{kind.__name__}: {first[0]!r} is no sentence"


def test_every_error_says_whether_trying_again_can_help() -> None:
    assert "retryable" in HoldfastError.__dict__
    assert [kind for kind in error_classes() if not isinstance(kind.retryable, bool)] == []


def drawn_tree(docstring: str) -> dict[str, str | None]:
    """Class name -> parent name, as drawn with box characters."""
    parents: dict[str, str | None] = {}
    path: list[str] = []
    for line in docstring.splitlines():
        if match := re.fullmatch(r" {4}((?:[│ ] {3})*)(?:[├└]── )?([A-Z]\w+)(?: {2,}.*)?", line):
            depth = len(match[1]) // 4 + (1 if "──" in line else 0)
            path[depth:] = [match[2]]
            parents[match[2]] = path[depth - 1] if depth else None
    return parents


def test_the_tree_drawn_in_errors_is_the_tree_of_its_classes() -> None:
    classes = {
        kind.__name__: kind.__bases__[0].__name__ if kind is not HoldfastError else None
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, HoldfastError) and kind.__module__ == errors.__name__
    }
    assert drawn_tree(errors.__doc__ or "") == classes


# --- (f) SQL ----------------------------------------------------------------------------------------------------------


def built_sql(module: str, text: str) -> list[str]:
    """Statements that are put together from pieces where they are run."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in SQL_CALLS and _is_built(node.args[0]) and not _is_pragma(module, node.args[0]):
                found.append(f"{module}:{node.lineno} {name}() of a built text")
    return found


def _is_built(node: ast.expr) -> bool:
    if isinstance(node, ast.JoinedStr):
        return any(isinstance(part, ast.FormattedValue) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, (ast.Add, ast.Mod)):
        return any(isinstance(part, ast.JoinedStr) or _is_text(part) for part in (node.left, node.right))
    called = node.func if isinstance(node, ast.Call) else None
    return isinstance(called, ast.Attribute) and called.attr in ("format", "join", "replace") and _is_text(called.value)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def _is_pragma(module: str, node: ast.expr) -> bool:
    first = node.values[0] if isinstance(node, ast.JoinedStr) else None
    return module == PRAGMAS_IN and isinstance(first, ast.Constant) and str(first.value).startswith("PRAGMA ")


def test_no_statement_is_put_together_where_it_is_run() -> None:
    assert [fault for module, text in ALL.items() for fault in built_sql(module, text)] == []


@pytest.mark.parametrize(
    "text",
    [
        "tx.execute(text(f'SELECT {x}'))",
        "await_(tx.execute(f'DELETE FROM {t}'))",
        "text('SELECT %s' % x)",
        "text('SELECT ' + x)",
        "connection.exec_driver_sql('SELECT {}'.format(x))",
        "cursor.execute(f'PRAGMA {x}')",
    ],
)
def test_the_sql_check_detects(text: str) -> None:
    assert built_sql("m", text) != []


def test_the_audits_queries_are_filled_with_constants_only() -> None:
    filled = {
        value.value.id if isinstance(value.value, ast.Name) else ast.dump(value.value)
        for node in ast.walk(ast.parse(ALL["holdfast.audit"]))
        if isinstance(node, ast.keyword) and node.arg == "query" and isinstance(node.value, ast.JoinedStr)
        for value in node.value.values
        if isinstance(value, ast.FormattedValue)
    }
    assert filled <= {"_EDGES", "_PARKED"}
