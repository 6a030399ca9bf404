"""Softmax attention of a rank by any schedule, forward and backward.

While a step's calls run, the next step's keys are under way. Partial results merge in at least fp32; in the backward
pass the keys travel again, and each owner gets the gradients of its keys back and adds them in step order.
"""

import torch

from longspan.kernels.gather_add import gather_add
from longspan.kernels.merge import merge
from longspan.kernels.scatter import scatter_rows
from longspan.kernels.wide import wide_dtype
from longspan.parallel.exchange import start_exchange


def forward(q, k, v, schedule, backend, scale, group):
    """(out [T, Hq, D] in q's dtype, lse [T, Hq])."""
    if q.shape[0] == 0:
        for _ in arriving(
            k, v, schedule.steps, group
        ):  # a rank without queries still sends (nothing) and stays in step
            pass
        return torch.empty_like(q), q.new_empty(q.shape[:2], dtype=wide_dtype(q.dtype))
    out = lse = None
    for step, keys, values in arriving(k, v, schedule.steps, group):
        for call in step.calls:
            rows = call.query_rows
            part = backend.forward(q[rows], keys[call.key_rows], values[call.key_rows], call.pack, scale)
            if out is None:  # the first call covers every query: each sees at least itself
                out, lse = part
            else:
                if not schedule.queries_in_two[0]:
                    out = out.to(lse.dtype)
                merge(out, lse, *part, rows)
    return out.to(q.dtype), lse


def backward(d_out, q, k, v, out, lse, schedule, backend, scale, group):
    """dq, dk, dv in the dtypes of q, k, v. What is rounded once at the end, or to be sent, is summed in that dtype, all
    else in fp32 at least."""
    steps, wide = schedule.backward, wide_dtype(q.dtype)
    query_sums = None if schedule.queries_in_two[1] else wide
    dq = dk = dv = None
    kept, returning = {}, []
    for number, (step, keys, values) in enumerate(arriving(k, v, steps, group)):
        dkeys, dvalues = (dk, dv) if step.local else (None, None)
        key_sums = None if step.keys_in_two and step.last_to_send is None and not step.local else wide
        for call in step.calls:
            rows, key_rows = call.query_rows, call.key_rows
            part = backend.backward(
                d_out[rows], q[rows], keys[key_rows], values[key_rows], out[rows], lse[rows], call.pack, scale
            )
            dq = _added(dq, rows, part[0], q, query_sums)
            dkeys, dvalues = (
                _added(total, key_rows, grad, keys, key_sums) for total, grad in zip((dkeys, dvalues), part[1:])
            )
            del part  # before the next call
        if len(steps) == 1:
            return tuple(_like(x, total) for x, total in ((q, dq), (k, dkeys), (v, dvalues)))
        dkeys, dvalues = (
            torch.zeros_like(keys, dtype=key_sums) if x is None else x if key_sums is None else x.to(key_sums)
            for x in (dkeys, dvalues)
        )
        if step.local:
            dk, dv = kept[None] = dkeys, dvalues
        while returning:
            _add_returned(*returning.pop(0))
        for source in _answered(kept, steps, number):
            returning.append(_return(steps[source], kept.pop(source), kept, k, v, group))
        if step.last_to_send is not None:
            kept[number] = dkeys, dvalues
        elif not step.local:
            returning.append(_return(step, (dkeys, dvalues), kept, k, v, group))
    while returning or len(kept) > 1:
        while returning:
            _add_returned(*returning.pop(0))
        for source in _answered(kept, steps, len(steps)):
            returning.append(_return(steps[source], kept.pop(source), kept, k, v, group))
    return _like(q, dq), _like(k, dk), _like(v, dv)


def _like(x, total):
    return torch.zeros_like(x) if total is None else total.to(x.dtype)


def _added(total, rows, part, like, dtype):
    """`total` with `part` added at `rows`, in `dtype`, None for the part's own. A total of None stands for zeros; a
    first part of all rows stays itself."""
    covers = (rows.stop - rows.start if isinstance(rows, slice) else len(rows)) == len(like)
    if total is None and covers and isinstance(rows, slice):
        return part
    if total is None:
        total = (torch.empty_like if covers else torch.zeros_like)(like, dtype=dtype or part.dtype)
        scatter_rows(total, rows, part, add=not covers)
        return total
    total = total if dtype is None else total.to(dtype)
    scatter_rows(total, rows, part)
    return total


def arriving(k, v, steps, group):
    """(step, keys, values) of every step, the next step's transfer started before this one is handed out."""
    kept = {None: (k, v)}

    def start(step):
        if step.local:
            return None, k, v
        keys, values = (x.new_empty(step.num_keys, *x.shape[1:]) for x in (k, v))
        sends = [(peer, x[rows].contiguous()) for peer, rows, source in step.sends for x in kept[source]]
        receives = [(peer, x[rows]) for peer, rows in step.receives for x in (keys, values)]
        return start_exchange(sends, receives, group), keys, values

    coming = [start(steps[0])]
    for number, step in enumerate(steps):
        pending, keys, values = coming.pop(0)
        if pending is not None:
            pending.wait()
        if step.last_to_send is not None:
            kept[number] = keys, values
        while number + len(coming) + 1 < len(steps) and (not coming or steps[number + len(coming)].beside):
            coming.append(start(steps[number + len(coming) + 1]))
        for source in [n for n in kept if n is not None and steps[n].last_to_send <= number + len(coming)]:
            del kept[source]
        yield step, keys, values


def _answered(kept, steps, number):
    """The kept steps whose gradients are complete before step `number`: all they were passed on to have answered, also
    where those passed it on again."""
    last = {n: steps[n].last_to_send for n in kept if n is not None}
    return [n for n in last if last[n] < number and last[n] not in kept]


def _return(step, gradients, totals, k, v, group):
    """Starts sending the gradients of a step's keys back to where they came from, the exchange of the step transposed;
    what comes is to be added to the totals of where they came from."""
    sends = [(peer, x[rows].to(k.dtype)) for peer, rows in step.receives for x in gradients]
    counts = [rows.stop - rows.start if isinstance(rows, slice) else len(rows) for _, rows, _ in step.sends]
    parts = [x.new_empty(sum(counts), *x.shape[1:]) for x in (k, v)]
    pieces = zip(*(x.split(counts) for x in parts))
    receives = [(peer, x) for (peer, _, _), of_peer in zip(step.sends, pieces) for x in of_peer]
    return start_exchange(sends, receives, group), [(totals[back.source], back, parts) for back in step.returns]


def _add_returned(pending, targets):
    pending.wait()
    for totals, back, parts in targets:
        for total, part in zip(totals, parts, strict=True):
            gather_add(total, back.rows, back.places, part)
