# SPDX-License-Identifier: MIT OR Apache-2.0
"""Whatever host and guest do in whatever order: a page lives in exactly one memfd, and nothing is left behind.

The rules (`rmp`) and the moves (`memory`) run together on real memfds; the model remembers what each page should hold.
"""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from svsm.hardware.memory import PhysicalMemory
from svsm.hardware.rmp import LARGE_PAGE, PAGE, Home, Outcome, Region, ReverseMap

BASE = 0x4000_0000
SPAN = 2 * LARGE_PAGE
PAGES = st.sampled_from([0, 1, 2, 511, 512, 513]).map(lambda page: BASE + page * PAGE)
PLACES = st.one_of(
    st.tuples(PAGES, st.just(PAGE)),
    st.tuples(st.sampled_from([BASE, BASE + LARGE_PAGE]), st.just(LARGE_PAGE)),
)
WATCHED = [BASE + page * PAGE for page in (0, 1, 2, 511, 512, 513)]


class Pages(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.rmp = ReverseMap([Region(BASE, SPAN)])
        self.memory = PhysicalMemory()
        self.expected = dict.fromkeys(WATCHED, 0)

    def teardown(self) -> None:
        self.memory.close()

    def settle(self, outcome: Outcome) -> None:
        change = outcome.change
        if change is None:
            return
        assert outcome.code == 0
        self.memory.carry_out(change)
        self.rmp.commit(change)
        if change.zero:
            for page in WATCHED:
                if change.gpa <= page < change.gpa + change.length:
                    self.expected[page] = 0

    @rule(place=PLACES, assign=st.booleans())
    def host_updates(self, place: tuple[int, int], assign: bool) -> None:
        self.settle(self.rmp.plan_update(*place, assign=assign))

    @rule(place=PLACES, validate=st.booleans())
    def guest_validates(self, place: tuple[int, int], validate: bool) -> None:
        self.settle(self.rmp.plan_pvalidate(*place, validate=validate))

    @rule(place=PLACES, vmpl=st.integers(0, 4), mask=st.integers(0, 15), vmsa=st.booleans())
    def guest_adjusts(self, place: tuple[int, int], vmpl: int, mask: int, vmsa: bool) -> None:
        self.settle(self.rmp.plan_rmpadjust(*place, vmpl | mask << 8 | int(vmsa) << 16))

    @rule(page=st.sampled_from(WATCHED), accept=st.booleans())
    def firmware_launches(self, page: int, accept: bool) -> None:
        outcome = self.rmp.plan_pre_guest(page, PAGE)
        self.settle(outcome)
        if outcome.change is not None:
            after = (
                self.rmp.plan_guest_valid(outcome.change, permissions=(0, 0, 0), vmsa=False)
                if accept
                else self.rmp.plan_reclaim(outcome.change)
            )
            self.settle(Outcome(0, change=after))

    @rule(page=st.sampled_from(WATCHED), value=st.integers(1, 255))
    def owner_writes(self, page: int, value: int) -> None:
        self.memory.write(self.rmp.entry(page).home, page, bytes([value]) * PAGE)
        self.expected[page] = value

    @rule(page=st.sampled_from(WATCHED), value=st.integers(1, 255))
    def host_scribbles_elsewhere(self, page: int, value: int) -> None:
        """The host may write into its own memfd at any offset; it must not matter."""
        if self.rmp.entry(page).home is not Home.SHARED:
            self.memory.write(Home.SHARED, page, bytes([value]) * PAGE)

    @invariant()
    def one_home(self) -> None:
        for page in WATCHED:
            home = self.rmp.entry(page).home
            assert self.memory.read(home, page, PAGE) == bytes([self.expected[page]]) * PAGE
            for other in Home:
                # What the host scribbled on its own memfd is the host's; no other memory holds anything.
                if other not in (home, Home.SHARED):
                    assert not self.memory.populated(other, page, PAGE)


Pages.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestPages = Pages.TestCase
