"""Programs as JAX traces them: written out in one list, run with parts exchanged, asked where they come from."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.extend import core, source_info_util
from jax.extend.core import primitives

_INLINED = {primitives.jit_p: "jaxpr", primitives.closed_call_p: "call_jaxpr"}


def flat_jaxpr(function: Callable[..., Any], *arguments: Any) -> core.ClosedJaxpr:
    """Trace a function and write out its inner calls, so that every use of a variable stands in one list.

    Only scans and checkpointed parts keep a jaxpr of their own, written out in the same way.
    """
    closed = jax.make_jaxpr(function)(*arguments)
    flat = jax.tree.leaves(arguments)
    return jax.make_jaxpr(lambda *a: run_jaxpr(closed.jaxpr, closed.consts, a))(*flat)


def run_jaxpr(jaxpr: Any, consts: Sequence[Any], arguments: Sequence[Any]) -> list[Any]:
    """Evaluate a jaxpr with its inner calls written out."""
    environment = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))
    for eqn in jaxpr.eqns:
        values = [read(environment, atom) for atom in eqn.invars]
        if eqn.primitive in _INLINED:
            inner = eqn.params[_INLINED[eqn.primitive]]
            with _as_written(eqn):
                results = run_jaxpr(inner.jaxpr, inner.consts, values)
        elif eqn.primitive is primitives.scan_p:
            results, _ = run_scan(eqn, values, _without_more(eqn.params["jaxpr"]))
        elif eqn.primitive is primitives.remat_p:
            results = run_checkpointed(eqn, values, functools.partial(run_jaxpr, eqn.params["jaxpr"], ()))
        else:
            results = bind(eqn, values)
        environment.update(zip(eqn.outvars, results, strict=True))
    return [read(environment, atom) for atom in jaxpr.outvars]


def _without_more(inner: core.ClosedJaxpr) -> Callable[[list[Any], Any, Any], tuple[list[Any], Any]]:
    return lambda values, carried, _: (run_jaxpr(inner.jaxpr, inner.consts, values), carried)


def read(environment: Mapping[Any, Any], atom: Any) -> Any:
    """Value of a variable or a literal."""
    return atom.val if isinstance(atom, core.Literal) else environment[atom]


@contextlib.contextmanager
def _as_written(eqn: Any) -> Iterator[None]:
    """Trace as a part of the model's code that an equation comes from; a library's inner equations come from its call."""
    known = source_info_util.summarize(eqn.source_info) not in ("", "unknown")
    traceback = (eqn.source_info if known else source_info_util.current()).traceback
    stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(traceback, name_stack=stack), eqn.ctx.manager:
        yield


def bind(eqn: Any, values: Sequence[Any]) -> list[Any]:
    """Apply one equation, as a part of the model's code that it comes from."""
    with _as_written(eqn):
        result = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
    return list(result) if eqn.primitive.multiple_results else [result]


def run_scan(
    eqn: Any,
    values: Sequence[Any],
    body: Callable[[list[Any], Any, Any], tuple[list[Any], Any]],
    carried: Any = None,
    sequences: Any = None,
) -> tuple[list[Any], Any]:
    """Scan as an equation does, with another body and more to carry.

    Args:
      eqn: the scan.
      values: of its variables; pytrees are welcome.
      body: function of the inner variables' values, of what is carried besides and of a slice of ``sequences``, to the
        inner results and what is carried on.
      carried: carried besides, from iteration to iteration.
      sequences: sliced besides.

    Returns:
      The equation's results, and what is carried at the end.
    """
    consts, carries = scan_inputs(eqn)
    constant, initial, sliced = values[:consts], values[consts : consts + carries], values[consts + carries :]

    def step(carry: Any, slices: Any) -> tuple[Any, Any]:
        results, more = body([*constant, *carry[0], *slices[0]], carry[1], slices[1])
        return (results[:carries], more), results[carries:]

    options = {name: eqn.params[name] for name in ("length", "reverse", "unroll")}
    with _as_written(eqn):
        (last, carried), stacked = jax.lax.scan(step, (list(initial), carried), (list(sliced), sequences), **options)
    return [*last, *stacked], carried


def scan_inputs(eqn: Any) -> tuple[int, int]:
    """How many of a scan's variables are constants, and how many are carried; slices follow."""
    if "ft_in" in eqn.params:  # JAX 0.12
        constants, carried, _ = eqn.params["ft_in"].unpack()
        return len(constants), len(carried)
    return eqn.params["num_consts"], eqn.params["num_carry"]


def run_checkpointed(eqn: Any, values: Sequence[Any], body: Callable[[list[Any]], Any]) -> Any:
    """Call under ``jax.checkpoint`` with an equation's own policy."""
    prevent = eqn.params["prevent_cse"]
    prevent = any(prevent) if isinstance(prevent, tuple) else prevent
    with _as_written(eqn):
        return jax.checkpoint(lambda v: body(v), prevent_cse=prevent, policy=eqn.params["policy"])(list(values))


def live_equations(jaxpr: Any, *, with_effects: bool = True) -> frozenset[int]:
    """Numbers of the equations that the results depend on, and of those that do something besides."""
    needed = {atom for atom in jaxpr.outvars if isinstance(atom, core.Var)}
    live = set()
    for index in reversed(range(len(jaxpr.eqns))):
        eqn = jaxpr.eqns[index]
        if (with_effects and eqn.effects) or any(var in needed for var in eqn.outvars):
            live.add(index)
            needed.update(atom for atom in eqn.invars if isinstance(atom, core.Var))
    return frozenset(live)


def where(eqn: Any) -> str:
    """File, line and function of the model's code that an equation comes from."""
    return "the result" if eqn is None else source_info_util.summarize(eqn.source_info) or "unknown"


def source_of(jaxpr: Any, var: Any) -> Any:
    """The variable that another one is, unchanged, followed back through inner programs; the variable itself if computed."""
    made = {out: (eqn, number) for eqn in jaxpr.eqns for number, out in enumerate(eqn.outvars)}
    while isinstance(var, core.Var) and var in made:
        eqn, number = made[var]
        inner = eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))
        inner = getattr(inner, "jaxpr", inner)
        if not isinstance(inner, core.Jaxpr) or len(inner.invars) != len(eqn.invars):
            return var
        source = source_of(inner, inner.outvars[number])
        position = inner.invars.index(source) if source in inner.invars else None
        if position is None or (eqn.primitive is primitives.scan_p and not _comes_out(eqn, position, number)):
            return var
        var = eqn.invars[position]
    return var


def _comes_out(eqn: Any, position: int, number: int) -> bool:
    """Whether a scan whose body returns an input as it is does so, too: what is carried in its place, slices put together."""
    consts, carries = scan_inputs(eqn)
    return position - consts == number < carries if position < consts + carries else number >= carries
