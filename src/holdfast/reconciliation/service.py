"""Reconciliation's counter: compare, list, repair, dismiss. It writes its own rows only; repairs are others' verbs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec

from holdfast import observe
from holdfast.audit import CHECKS, broken
from holdfast.clock import US_PER_MS, Clock
from holdfast.db.database import Database, Tx
from holdfast.db.group_commit import GroupCommit
from holdfast.errors import HoldfastError, InvalidInput
from holdfast.ids import IdSource
from holdfast.reconciliation import store
from holdfast.reconciliation.model import (
    LIVE,
    PROVIDER_KINDS,
    Actor,
    Difference,
    DifferenceClosed,
    DifferenceNotFound,
    DifferenceView,
    Found,
    NoSafeRepair,
    Reason,
    RepairReport,
    RunReport,
    State,
    advice_of,
    checks_of,
    found_row,
    is_news,
    kind_of,
    view,
)
from holdfast.reconciliation.repairs import Repairs
from holdfast.reconciliation.statement import compare
from holdfast.services.payments.needs import Provider
from holdfast.settings import ReconciliationSettings

LIST_MAX = 200
FOUND_MAX = 500  # of one kind in one comparison
AUTO_MAX = 100  # repairs after one comparison
AUTO_AGAIN = 10  # intervals until a repair that did not help is run again
LOAD_MAX = 0.05  # share of the time that one check may run
STATEMENT_EVERY_S = 3_600.0
RUNS_KEPT_US = 7 * 86_400_000_000
SWEEPER = "sweeper"

log = observe.logger("reconciliation")


class Sighting(msgspec.Struct, frozen=True, kw_only=True):
    """What one comparison saw of the kinds that it looked at in full."""

    started_us: int
    whole: frozenset[str]  # of these, what was not found is gone
    found: tuple[Found, ...]
    actor: str
    reason: str
    is_run: bool = True


class Noted(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the rows."""

    new: int
    gone: int
    repaired: int


class Deed(msgspec.Struct, frozen=True, kw_only=True):
    """What somebody did about a difference."""

    difference_id: int
    action: str
    actor: str
    reason: str
    outcome: str


class ReconciliationDesk:
    """Questions about differences; reads only, so it also serves beside a running server."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def list(
        self,
        *,
        states: Sequence[State] = (State.OPEN,),
        kind: str | None = None,
        after: int = 0,
        limit: int = 50,
    ) -> Sequence[DifferenceView]:
        """Differences in order of id, from the one behind `after`."""
        if not 1 <= limit <= LIST_MAX:
            raise InvalidInput(f"limit must be in 1..{LIST_MAX}, not {limit}; page on with after=<the last id>")
        wanted = [state.value for state in states]
        async with self._database.read() as tx:
            page = await store.page(tx, states=wanted, kind=kind, after=after, limit=limit)
        return [view(difference) for difference in page]

    async def get(self, difference_id: int) -> DifferenceView:
        """One difference; raises `DifferenceNotFound`."""
        return view(await self._known(difference_id))

    async def entries(self, difference_id: int) -> Sequence[Mapping[str, Any]]:
        """What was done about a difference, in order."""
        async with self._database.read() as tx:
            return await store.entries(tx, difference_id)

    async def _known(self, difference_id: int) -> Difference:
        async with self._database.read() as tx:
            known = await store.by_id(tx, difference_id)
        if known is None:
            raise DifferenceNotFound(f"there is no difference {difference_id}")
        return known


class ReconciliationService(ReconciliationDesk):
    """Compares the books and mends them; one comparison at a time writes through the group commit."""

    def __init__(
        self,
        database: Database,
        group: GroupCommit,
        clock: Clock,
        ids: IdSource,
        settings: ReconciliationSettings,
        repairs: Repairs,
        providers: Mapping[str, Provider],
    ) -> None:
        super().__init__(database)
        self._group = group
        self._clock = clock
        self._ids = ids
        self._settings = settings
        self._repairs = repairs
        self._providers = providers
        self._due_s: dict[str, float] = {}

    async def run(self, actor: str, reason: str = "", *, dry_run: bool = False) -> RunReport:
        """Compare everything now; the report lists what is open. With `dry_run` nothing is written, only listed."""
        _check_who(actor, reason or "asked")
        return await self._run(None, actor, reason, dry_run=dry_run)

    async def repair(self, difference_id: int, actor: str, reason: str, *, dry_run: bool = False) -> RepairReport:
        """Run the proposed repair of an open difference; with `dry_run` only say what it would do.

        The difference is looked for again first: one that is gone is not repaired. What a repair sets going by
        messages is seen by the next comparison, which closes the difference as repaired. Raises
        `DifferenceNotFound`, `DifferenceClosed`, `NoSafeRepair`, or what the verb raises; that stands in the log too.
        """
        _check_who(actor, reason)
        difference = await self._known(difference_id)
        if difference.state != State.OPEN:
            raise DifferenceClosed(f"the difference is {difference.state}")
        if difference.mend is None:
            raise NoSafeRepair(difference.advice or "no repair can be run for this difference")
        if dry_run:
            return _repair_report(difference, State.OPEN, dry_run=True)
        failure = (await self._mend(difference.kind, [difference], actor, reason)).get(difference_id)
        if failure is not None:
            raise failure
        return _repair_report(difference, State((await self._known(difference_id)).state), dry_run=False)

    async def dismiss(self, difference_id: int, actor: str, reason: str) -> DifferenceView:
        """Leave a difference as it is: it is not proposed again while it says the same.

        Raises `DifferenceNotFound` or `DifferenceClosed`; dismissing a dismissed one again does no harm.
        """
        _check_who(actor, reason)
        await self._log(difference_id, "dismiss", actor, reason, "")
        return await self.get(difference_id)

    async def sweep(self) -> int:
        """Compare what is due; answers how many differences are new. One process does it for all in an interval."""
        now_us = self._clock.now_us()
        async with self._database.read() as tx:
            last_us = await store.last_run(tx, SWEEPER)
        if last_us > now_us - self._settings.every_ms * US_PER_MS * 9 // 10:
            return 0
        now_s = self._clock.monotonic()
        names = {check.name for check in CHECKS} | PROVIDER_KINDS
        due = frozenset(name for name in names if self._due_s.get(name, 0.0) <= now_s)
        report = await self._run(due, SWEEPER, "every interval", dry_run=False)
        if self._settings.repair == "auto":
            await self._repair_safe()
        return report.new

    async def _repair_safe(self) -> None:
        again_us = self._clock.now_us() - AUTO_AGAIN * self._settings.every_ms * US_PER_MS
        wanted: dict[str, list[Difference]] = {}
        after = chosen = 0
        while chosen < AUTO_MAX:
            async with self._database.read() as tx:
                page = await store.page(tx, states=[State.OPEN.value], kind=None, after=after, limit=LIST_MAX)
            if not page:
                break
            after = page[-1].id
            for difference in page:
                tried_lately = difference.repair_us is not None and difference.repair_us > again_us
                if kind_of(difference.kind).safe and difference.mend and not tried_lately and chosen < AUTO_MAX:
                    wanted.setdefault(difference.kind, []).append(difference)
                    chosen += 1
        for kind, differences in wanted.items():
            for difference_id, error in (await self._mend(kind, differences, SWEEPER, "safe, repair = auto")).items():
                log.warning("repair_failed", difference_id=difference_id, error=error.code, detail=error.detail)

    async def _mend(self, kind: str, wanted: Sequence[Difference], actor: str, reason: str) -> dict[int, HoldfastError]:
        """Repair differences of one kind, looking before and after all of them; answers what could not be."""
        found, whole, _ = await self._look({kind})
        still = {each.subject: each.detail for each in found}
        failures: dict[int, HoldfastError] = {}
        for difference in wanted:
            if difference.subject not in still and kind in whole:
                failures[difference.id] = DifferenceClosed("the difference is gone by itself")
                continue
            assert difference.mend is not None
            outcome = difference.repair
            try:
                await self._repairs.run(difference.mend, still.get(difference.subject, difference.facts), actor, reason)
            except HoldfastError as error:
                failures[difference.id] = error
                outcome = error.code
            await self._log(difference.id, "repair", actor, reason, outcome)
        found, whole, _ = await self._look({kind})
        await self._note(found, whole, actor, reason)
        return failures

    # -- comparing ----------------------------------------------------------------------------------------------------

    async def _run(self, names: frozenset[str] | None, actor: str, reason: str, *, dry_run: bool) -> RunReport:
        started_us = self._clock.now_us()
        found, whole, notes = await self._look(names)
        noted = Noted(new=0, gone=0, repaired=0)
        if dry_run:
            shown = await self._unwritten(found, started_us)
        else:
            noted = await self._note(found, whole, actor, reason, started_us=started_us, is_run=True)
            shown = list(await self.list(limit=LIST_MAX))
        return RunReport(
            dry_run=dry_run,
            kinds=len(whole),
            found=len(found),
            new=sum(each.id == "0" for each in shown) if dry_run else noted.new,
            gone=noted.gone,
            repaired=noted.repaired,
            notes=tuple(notes),
            differences=tuple(shown),
        )

    async def _look(self, names: Collection[str] | None) -> tuple[list[Found], frozenset[str], list[str]]:
        """(what differs, the kinds that were looked at in full, what could not be looked at); reads only."""
        wanted = None if names is None else frozenset(names)
        slack_us = self._settings.slack_ms * US_PER_MS
        found: list[Found] = []
        whole: set[str] = set()
        for check in checks_of(wanted, CHECKS):
            began_s = self._clock.monotonic()
            rows = await broken(self._database, check, self._clock.now_us(), slack_us, FOUND_MAX)
            now_s = self._clock.monotonic()
            self._due_s[check.name] = now_s + (now_s - began_s) / LOAD_MAX
            found += [found_row(check.name, row) for row in rows]
            if len(rows) < FOUND_MAX:
                whole.add(check.name)
        notes: list[str] = []
        if wanted is None or wanted & PROVIDER_KINDS:
            compared = await compare(self._database, self._providers, self._clock.now_us(), slack_us)
            found += [each for each in compared.found if wanted is None or each.kind in wanted]
            notes = compared.notes
            due_s = self._clock.monotonic() + STATEMENT_EVERY_S
            self._due_s |= dict.fromkeys(PROVIDER_KINDS, due_s)
            if compared.complete:
                whole |= PROVIDER_KINDS if wanted is None else PROVIDER_KINDS & wanted
        unique = {(each.kind, each.subject): each for each in found}
        return list(unique.values()), frozenset(whole), notes

    async def _note(
        self,
        found: Sequence[Found],
        whole: frozenset[str],
        actor: str,
        reason: str,
        *,
        started_us: int | None = None,
        is_run: bool = False,
    ) -> Noted:
        now_us = self._clock.now_us()
        sighting = Sighting(
            started_us=now_us if started_us is None else started_us,
            whole=whole,
            found=tuple(found),
            actor=actor,
            reason=reason,
            is_run=is_run,
        )
        return await self._group.submit(self._write, sighting)

    async def _unwritten(self, found: Sequence[Found], now_us: int) -> list[DifferenceView]:
        """The differences as they would be written; those that have no row yet with the id 0."""
        async with self._database.read() as tx:
            kinds = {each.kind for each in found}
            known = {(each.kind, each.subject): each for each in await store.live(tx, kinds)}
        return [
            view(known.get((each.kind, each.subject)) or Difference(**self._row(each, now_us) | {"id": 0}))
            for each in found
        ]

    async def _write(self, tx: Tx, sightings: Sequence[Sighting]) -> list[Noted | HoldfastError]:
        return [await self._write_one(tx, sighting) for sighting in sightings]

    async def _write_one(self, tx: Tx, sighting: Sighting) -> Noted:
        now_us = self._clock.now_us()
        kinds = sighting.whole | {each.kind for each in sighting.found}
        live = {(each.kind, each.subject): each for each in await store.live(tx, kinds, lock=True)}
        fresh = []
        for each in sighting.found:
            known = live.pop((each.kind, each.subject), None)
            if known is None:
                fresh.append(self._row(each, now_us))
            else:
                await self._seen_again(tx, known, each, now_us)
        new = await store.add(tx, fresh)
        if new:
            tx.on_commit(lambda: log.error("differences_found", new=new, kinds=sorted({row["kind"] for row in fresh})))
        gone = repaired = 0
        for (kind, _), difference in live.items():
            # A row that another comparison saw after this one had begun to look is left to the next one.
            if kind in sighting.whole and difference.last_seen_us <= sighting.started_us:
                mended = difference.repair_us is not None
                repaired, gone = repaired + mended, gone + (not mended)
                state = State.REPAIRED if mended else State.GONE
                await store.change(tx, difference.id, state=state.value, closed_us=now_us)
        if sighting.is_run:
            told = f"{len(sighting.found)} found, {new} new, {gone} gone, {repaired} repaired"
            await store.insert_entries.many(tx, [self._entry(None, "run", sighting.actor, sighting.reason, told)])
            await store.forget_runs(tx, SWEEPER, now_us - RUNS_KEPT_US)
        return Noted(new=new, gone=gone, repaired=repaired)

    async def _seen_again(self, tx: Tx, known: Difference, found: Found, now_us: int) -> None:
        values: dict[str, Any] = {"last_seen_us": now_us, "detail": store.text_of(found.detail)}
        if known.state == State.DISMISSED and is_news(known.detail, found.detail):
            values["state"] = State.OPEN.value
            entry = self._entry(known.id, "reopen", SWEEPER, "it says something else than when it was dismissed", "")
            await store.insert_entries.many(tx, [entry])
        await store.change(tx, known.id, **values)

    def _row(self, found: Found, now_us: int) -> dict[str, Any]:
        repair = kind_of(found.kind).repair
        return {
            "id": self._ids.next(),
            "kind": found.kind,
            "subject": found.subject,
            "detail": store.text_of(found.detail),
            "repair": repair.value if repair else "",
            "advice": advice_of(found.kind),
            "state": State.OPEN.value,
            "first_seen_us": now_us,
            "last_seen_us": now_us,
            "repair_us": None,
            "closed_us": None,
        }

    # -- deeds --------------------------------------------------------------------------------------------------------

    async def _log(self, difference_id: int, action: str, actor: str, reason: str, outcome: str) -> None:
        deed = Deed(difference_id=difference_id, action=action, actor=actor, reason=reason, outcome=outcome)
        await self._group.submit(self._do, deed)

    async def _do(self, tx: Tx, deeds: Sequence[Deed]) -> list[HoldfastError | None]:
        return [await self._do_one(tx, deed) for deed in deeds]

    async def _do_one(self, tx: Tx, deed: Deed) -> HoldfastError | None:
        known = await store.by_id(tx, deed.difference_id, lock=True)
        if known is None:
            return DifferenceNotFound(f"there is no difference {deed.difference_id}")
        if deed.action == "dismiss":
            if known.state not in LIVE:
                return DifferenceClosed(f"the difference is {known.state}")
            await store.change(tx, known.id, state=State.DISMISSED.value)
        else:
            await store.change(tx, known.id, repair_us=self._clock.now_us())
        entry = self._entry(known.id, deed.action, deed.actor, deed.reason, deed.outcome)
        await store.insert_entries.many(tx, [entry])
        return None

    def _entry(self, difference_id: int | None, action: str, actor: str, reason: str, outcome: str) -> dict[str, Any]:
        return {
            "id": self._ids.next(),
            "difference_id": difference_id,
            "action": action,
            "actor": actor,
            "reason": reason,
            "outcome": outcome,
            "at_us": self._clock.now_us(),
        }


def _repair_report(difference: Difference, state: State, *, dry_run: bool) -> RepairReport:
    return RepairReport(
        id=str(difference.id), dry_run=dry_run, repair=difference.repair, what=difference.advice, state=state
    )


def _check_who(actor: str, reason: str) -> None:
    for name, value, kind in (("actor", actor, Actor), ("reason", reason, Reason)):
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            raise InvalidInput(f"{name}: {error}") from None
