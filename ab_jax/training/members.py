"""Several runs in one program: members that differ in seed, rates, decay or ramps.

One narrow network leaves an accelerator idle. Members are whole runs, each with its own loop
(`ab_jax.training.loop.train`), order, checkpoints and record, in a thread of its own. Where their
loops call a compiled step they wait for each other, and one program computes it for all:

    vmap        over the members; their convolutions become grouped ones
    unrolled    the step of one member, written out for each of them
    in_turn     no such program: the calls one after another, which share a process and its data

Which is fastest depends on the network and the device, and is measured before the first step. A
member that ends, or fails, leaves the others behind.
"""

import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeVar, get_args

import jax
import jax.numpy as jnp

from ab_jax.training.parallel import Parallel, Tree
from ab_jax.training.stopping import noted_signals

Form = Literal["vmap", "unrolled", "in_turn"]
FORMS: tuple[Form, ...] = get_args(Form)

_TIMED_CALLS = 3  # of each form, after the one that compiles

Result = TypeVar("Result")
Arguments = tuple[Any, ...]


def run_together(
    jobs: Sequence[Callable[["Member"], Result]], parallel: Parallel, *, form: Form | None = None
) -> list[Result | BaseException]:
    """Do the members' jobs, each in a thread.

    Args:
      jobs: each trains, with what it is given in place of `parallel`. What they wrap must be the
        same functions, in the same order: only arrays may differ.
      parallel: the devices.
      form: how calls are computed together; None: as measured at the first training step.

    Returns:
      What each job returned or raised.

    Raises:
      ValueError: no jobs, several processes, or a form that there is not.
    """
    if not jobs:
        raise ValueError("There are no runs to train together.")
    if jax.process_count() > 1:
        raise ValueError(
            "Runs train together in one process. Where several processes train one run, start the "
            "runs one by one."
        )
    if form is not None and form not in FORMS:
        raise ValueError(f"form={form!r} must be one of {', '.join(FORMS)}.")
    ends: dict[int, Result | BaseException] = {}
    with noted_signals() as asked_to_stop:
        meeting = Meeting(len(jobs), form, asked_to_stop)

        def attend(number: int) -> None:
            p = parallel
            try:
                ends[number] = jobs[number](
                    Member(p.mode, p.devices, p.norm_group, meeting=meeting, number=number)
                )
            except BaseException as error:
                ends[number] = error
            finally:
                meeting.leave()

        # Of a process that is ended by a second signal they are no part.
        threads = [
            threading.Thread(target=attend, args=(i,), daemon=True) for i in range(len(jobs))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    return [ends[number] for number in range(len(jobs))]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Member(Parallel):
    """The devices, as one of several runs sees them that train together.

    Attributes:
      meeting: where the members' calls come together.
      number: of this member, from 0.
    """

    meeting: "Meeting"
    number: int
    _wrapped: Iterator[int] = dataclasses.field(
        default_factory=itertools.count, init=False, repr=False
    )

    @property
    def speaks(self) -> bool:
        """See `Parallel`: the first of them."""
        return self.number == 0

    def place(self, tree: Tree) -> Tree:
        """As `Parallel.place`, of the same arrays once for all members."""
        return self.meeting.placed(tree, super().place)

    def wrap(
        self, step: Callable[..., Any], sharded: Sequence[bool], *, donate: Sequence[int] = ()
    ) -> Callable[..., Any]:
        """As `Parallel.wrap`; a call waits for those of the other members.

        Raises:
          ValueError: the other members' function takes other arguments.
        """
        alone = Parallel(self.mode, self.devices, self.norm_group)
        function = self.meeting.function(
            next(self._wrapped), lambda: _Function(alone, step, sharded, donate)
        )
        if function.takes != (tuple(sharded), tuple(donate)):
            raise ValueError(
                "Runs that train together must be alike but for their numbers: one of them has a "
                "step of other arguments, as for a teacher. Train them one by one."
            )
        return lambda *args: self.meeting.call(self.number, function, args)

    def asked_to_stop(self) -> str | None:
        """The signal that asks all members to stop: the same answer between the same calls."""
        return self.meeting.signal

    def described(self) -> dict[str, Any]:
        """For the record: how many runs there are, how their calls are computed, and what was
        measured of that, in seconds a call.
        """
        meeting = self.meeting
        return {
            "members": meeting.members,
            "form": meeting.form or "in_turn",
            "seconds": dict(meeting.seconds),
        }


class Meeting:
    """Where the calls of several threads wait for each other, to be computed together.

    Args:
      members: how many threads there are.
      form: how; None: as measured.
      asked_to_stop: the name of a signal that was noted, or None.
    """

    def __init__(
        self, members: int, form: Form | None, asked_to_stop: Callable[[], str | None]
    ) -> None:
        self.members = members
        self.form = form
        self.seconds: dict[Form, float] = {}
        self.signal: str | None = None
        self._asked_to_stop = asked_to_stop
        self._present = members
        self._waiting: dict[int, _Call] = {}
        self._functions: dict[int, _Function] = {}
        self._placed: dict[tuple[int, ...], tuple[Any, Any]] = {}
        self._condition = threading.Condition()

    def function(self, number: int, make: Callable[[], "_Function"]) -> "_Function":
        """The function that members wrapped as their `number`-th."""
        with self._condition:
            if number not in self._functions:
                self._functions[number] = make()
            return self._functions[number]

    def placed(self, tree: Tree, place: Callable[[Tree], Tree]) -> Tree:
        """A tree on the devices, placed once."""
        key = tuple(map(id, jax.tree.leaves(tree)))
        with self._condition:
            if key not in self._placed:  # the arrays are kept, so that their ids stay theirs
                self._placed[key] = tree, place(tree)
            found: Tree = self._placed[key][1]
            return found

    def call(self, member: int, function: "_Function", args: Arguments) -> Any:
        """What the function returns of a member's arguments, once all members have called."""
        call = _Call.of(function, args)  # before others wait for it: it may fail
        with self._condition:
            self._waiting[member] = call
            self._compute_if_all_wait()
            self._condition.wait_for(lambda: call.done)
        if call.error is not None:
            raise call.error
        return call.result

    def leave(self) -> None:
        """A member will not call any more."""
        with self._condition:
            self._present -= 1
            self._compute_if_all_wait()

    def _compute_if_all_wait(self) -> None:
        if not self._waiting or len(self._waiting) < self._present:
            return
        calls = [self._waiting[member] for member in sorted(self._waiting)]
        self._waiting.clear()
        # Members that were resumed elsewhere may call other functions, or with other shapes.
        alike: dict[Any, list[_Call]] = {}
        for call in calls:
            alike.setdefault(call.kind, []).append(call)
        for group in alike.values():
            self._compute(group)
        self.signal = self._asked_to_stop()
        self._condition.notify_all()

    def _compute(self, calls: "list[_Call]") -> None:
        function, arguments = calls[0].function, [call.args for call in calls]
        try:
            if self.form is None and function.trains and len(calls) > 1:
                self.seconds = seconds = _seconds_of_forms(function, arguments)
                self.form = sorted(seconds, key=lambda form: seconds[form])[0]
            results = function(self.form or "in_turn", arguments)
        except Exception as error:
            for call in calls:
                call.error, call.done = error, True
            return
        for call, result in zip(calls, results, strict=True):
            call.result, call.done = result, True


@dataclasses.dataclass(eq=False)
class _Call:
    """A member's call; those of one kind can be computed together."""

    function: "_Function"
    args: Arguments
    kind: Any
    result: Any = None
    error: BaseException | None = None
    done: bool = False

    @classmethod
    def of(cls, function: "_Function", args: Arguments) -> "_Call":
        leaves, structure = jax.tree.flatten(args)
        kind = function, structure, tuple((x.shape, x.dtype) for x in leaves)
        return cls(function, args, kind)


class _Function:
    """A per-device step, for several members at once.

    Args:
      parallel: the devices.
      step, sharded, donate: as for `Parallel.wrap`.
    """

    def __init__(
        self,
        parallel: Parallel,
        step: Callable[..., Any],
        sharded: Sequence[bool],
        donate: Sequence[int],
    ) -> None:
        self._parallel = parallel
        self._step = step
        self._sharded = sharded
        self._donate = donate
        self._alone = parallel.wrap(step, sharded, donate=donate)
        self.takes = tuple(sharded), tuple(donate)
        self._programs: dict[tuple[Form, int, tuple[bool, ...]], Callable[..., Any]] = {}

    @property
    def trains(self) -> bool:
        """Whether it takes over a state, as training steps do."""
        return bool(self._donate)

    def __call__(self, form: Form, members: Sequence[Arguments]) -> list[Any]:
        """What the step returns of each member's arguments."""
        if form == "in_turn" or len(members) == 1:
            return [self._alone(*args) for args in members]
        by_place = list(zip(*members, strict=True))
        shared = tuple(all(_is_same(one, of[0]) for one in of[1:]) for of in by_place)
        program, count = self._program(form, len(members), shared)
        if missing := count - len(members):
            by_place = list(zip(*members, *self.copied([members[0]] * missing), strict=True))
        given = [of[0] if once else of for once, of in zip(shared, by_place, strict=True)]
        return list(program(*given))[: len(members)]

    def _program(
        self, form: Form, count: int, shared: tuple[bool, ...]
    ) -> tuple[Callable[..., Any], int]:
        """A program for so many members, or somewhat more, and for how many it is.

        Where one has left, computing its part for nothing is less than compiling anew.
        """
        for (of_form, known, of_shared), program in self._programs.items():
            if (of_form, of_shared) == (form, shared) and count <= known < 2 * count:
                return program, known
        together = _together(self._step, form, count, shared)
        program = self._parallel.wrap(together, self._sharded, donate=self._donate)
        self._programs[form, count, shared] = program
        return program, count

    def copied(self, members: Sequence[Arguments]) -> list[Arguments]:
        """The arguments with copies of those whose memory a call takes over."""
        return [
            tuple(
                jax.tree.map(jnp.copy, x) if place in self._donate else x
                for place, x in enumerate(args)
            )
            for args in members
        ]


def _is_same(tree: Any, other: Any) -> bool:
    """Whether both are the very same arrays."""
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    return all(x is y for x, y in pairs)


def _together(
    step: Callable[..., Any], form: Form, count: int, shared: Sequence[bool]
) -> Callable[..., tuple[Any, ...]]:
    """The per-device step of several members.

    Args:
      step: of one.
      form: how.
      count: of members.
      shared: for each argument, whether all members have the same; of others it takes a tuple.
    """

    def unrolled(*args: Any) -> tuple[Any, ...]:
        return tuple(
            step(*(x if once else x[i] for once, x in zip(shared, args, strict=True)))
            for i in range(count)
        )

    def vmapped(*args: Any) -> tuple[Any, ...]:
        stacked = [
            x if once else jax.tree.map(lambda *leaves: jnp.stack(leaves), *x)
            for once, x in zip(shared, args, strict=True)
        ]
        found = jax.vmap(step, in_axes=[None if once else 0 for once in shared])(*stacked)
        return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], found) for i in range(count))

    return unrolled if form == "unrolled" or all(shared) else vmapped


def _seconds_of_forms(function: _Function, members: Sequence[Arguments]) -> dict[Form, float]:
    """Seconds of a call in each form, the least of a few; those that fail here are left out.

    Raises:
      Exception: as the step itself raises it.
    """
    seconds: dict[Form, float] = {}
    for form in FORMS:
        try:
            seconds[form] = _seconds(function, form, members)
        except Exception:
            # What one member can compute may lack a rule for vmap, or memory for all at once.
            if form == "in_turn":
                raise
    return seconds


def _seconds(function: _Function, form: Form, members: Sequence[Arguments]) -> float:
    times = []
    for _ in range(1 + _TIMED_CALLS):
        copies = jax.block_until_ready(function.copied(members))
        started = time.perf_counter()
        jax.block_until_ready(function(form, copies))
        times.append(time.perf_counter() - started)
    return min(times[1:])
