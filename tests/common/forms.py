"""Drive a linear-attention Form as attention/linear.py does, with states that enter and leave; the same by autograd."""

import itertools

import torch

from longspan.kernels.linear.form import Spans
from longspan.kernels.linear.general import General

# name: (spans' offsets, linked, entered, left)
SPANS = {
    "one": ((0, 200), (), (), ()),
    "token": ((0, 1), (0,), (0,), (0,)),
    "63": ((0, 63), (0,), (0,), ()),
    "64": ((0, 64), (0,), (), (0,)),
    "65": ((0, 65), (0,), (0,), (0,)),
    "mixed": ((0, 1, 2, 130, 131, 200, 459), (1, 2, 5), (2, 5), (1, 2)),
}


def spans_of(name):
    return Spans(*SPANS[name])


def random_inputs(spans, heads, key_size, value_size, decay, beta, *, seed=0, device="cpu", dtype=torch.float32):
    """(inputs, entry, d_out, exit_grad) for a Form: inputs by name; q and k of norm one where there is a beta.

    decay: None, "fixed", "fixed_closed", or a strength in `log_decays`, with "channel_" in front for one per channel.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator)

    tokens = spans.offsets[-1]
    q, k, v = (normal(tokens, heads, size) for size in (key_size, key_size, value_size))
    if beta:
        q, k = (torch.nn.functional.normalize(x, dim=-1) for x in (q, k))
    states = (normal(len(rows), heads, key_size, value_size) for rows in (spans.entered, spans.left))
    entry, exit_grad = (x.to(device) for x in states)
    log_decay = None
    if decay == "fixed":
        log_decay = -torch.rand(heads, generator=generator) * 0.2
    elif decay == "fixed_closed":
        log_decay = torch.tensor([-torch.inf, -0.1, -1e9])[:heads]
    elif decay is not None:
        shape = (tokens, heads, key_size) if decay.startswith("channel_") else (tokens, heads)
        log_decay = log_decays(decay.removeprefix("channel_"), torch.rand(shape, generator=generator))
    betas = torch.rand(tokens, heads, generator=generator) * beta if beta else None
    inputs = {"q": q.to(dtype), "k": k.to(dtype), "v": v.to(dtype), "log_decay": log_decay, "beta": betas}
    inputs = {name: x if x is None else x.to(device) for name, x in inputs.items()}
    return inputs, entry, normal(tokens, heads, value_size).to(device, dtype), exit_grad


def log_decays(strength, uniform):
    return {
        "medium": -0.2 * uniform,
        "strong": -20 - uniform,
        "weak": -1e-4 * uniform,
        "closed": torch.where(uniform < 0.02, -torch.inf, torch.where(uniform < 0.05, -1e9, -0.2 * uniform)),
        "spiky": torch.where(uniform < 0.1, -20.0, torch.where(uniform > 0.5, 0.0, -0.05)),
    }[strength]


def run_form(form, tables, inputs, entry, d_out, exit_grad, scale, *, states_travel=True):
    """Everything a Form gives, by name; None where it gives None."""
    args = inputs["q"], inputs["k"], inputs["v"], inputs["log_decay"], inputs["beta"], scale
    result = {}
    work = form(tables, *args)
    if states_travel:
        result["state"], result["transition"] = work.summary()
    work.ahead()
    result["out"], saved = work.output(entry, d_out.dtype)
    work = form(tables, *args)
    gate = inputs["log_decay"] is not None and inputs["log_decay"].ndim > 1
    work.start_backward(saved, d_out, gate)
    if states_travel:
        result["d_state"] = work.gradient_summary()
    work.gradient_ahead()
    grads = work.gradients(exit_grad)
    return result | dict(zip(("dq", "dk", "dv", "dlog_decay", "dbeta"), grads, strict=True))


def expected(spans, inputs, entry, d_out, exit_grad, scale):
    """The same from the recurrence, token by token in fp64 on the CPU, differentiated by autograd."""
    leaves = {name: x.cpu().double().requires_grad_() for name, x in inputs.items() if x is not None}
    entry, d_out, exit_grad = entry.cpu().double().requires_grad_(), d_out.cpu().double(), exit_grad.cpu().double()
    outs, exits, states, transitions, d_states = [], [], [], [], []
    for n, (start, stop) in enumerate(zip(spans.offsets, spans.offsets[1:])):
        rows = {name: x[start:stop] if name != "log_decay" or x.ndim > 1 else x for name, x in leaves.items()}
        first = entry[spans.entered.index(n)] if n in spans.entered else torch.zeros_like(_zero(rows))
        out, last = _recurrence(rows, first, scale)
        outs.append(out)
        if n in spans.left:
            exits.append((last * exit_grad[spans.left.index(n)]).sum())
        if n in spans.linked:
            probe = torch.zeros_like(first, requires_grad=True)
            out_alone, alone = _recurrence(rows, probe, scale)
            states.append(alone.detach())
            d_states.append(torch.autograd.grad((out_alone * d_out[start:stop]).sum(), probe, retain_graph=True)[0])
            transitions.append(_transition(rows, alone))
    out = torch.cat(outs)
    loss = (out * d_out).sum() + sum(exits)
    names = [name for name in leaves if name != "log_decay" or leaves[name].ndim > 1]
    grads = torch.autograd.grad(loss, [leaves[name] for name in names])
    result = {"out": out.detach()} | {f"d{name}": grad for name, grad in zip(names, grads)}
    if states:
        result |= {"state": torch.stack(states), "d_state": torch.stack(d_states)}
        if transitions[0] is not None:
            result["transition"] = torch.stack(transitions).detach()
    return result


def by_general(spans, given, scale):
    """What the Form should give, from the plain PyTorch form in fp64."""
    inputs, *states = given
    heads, sizes = inputs["q"].shape[1], (inputs["q"].shape[2], inputs["v"].shape[2])
    exact = {name: None if x is None else x.double() for name, x in inputs.items()}
    table = General.tables(spans, heads, *sizes).map(lambda x: x.to(inputs["q"].device))
    wanted = run_form(General, table, exact, *(x.double() for x in states), scale)
    return {name: x.cpu() for name, x in wanted.items() if x is not None}


def documents(num_tokens):
    """Mixed lengths with single tokens and a long rest, and the same tokens as one span in the middle of a document."""
    lengths, left = [], num_tokens
    for length in (1, 130, 1, 64, 500):
        if left > length:
            lengths.append(length)
            left -= length
    offsets = (0, *itertools.accumulate([*lengths, left]))
    last = len(offsets) - 2
    return [Spans(offsets, tuple(sorted({0, last})), (last,), (0,)), Spans((0, num_tokens), (0,), (0,), (0,))]


def errors(actual, wanted):
    """{name: norm of the difference over the norm of what is wanted}; inf for anything missing or of another shape."""
    result = {}
    for name, x in wanted.items():
        y = actual.get(name)
        if y is None or y.shape != x.shape:
            result[name] = float("inf")
            continue
        y = y.cpu().double()
        if name == "transition":  # where nothing is left kernels stop counting; matrices have no such numbers
            x, y = x.clamp(min=-36.0), y.clamp(min=-36.0)
        floor = 1e-2 * x.numel() ** 0.5
        error = ((y - x).norm() / x.norm().clamp(min=floor)).item()
        result[name] = error if error == error else float("inf")
    return result


def assert_within(errors, limits):
    """Every error below its limit, or all of them in the message, which pytest would cut."""
    listed = ", ".join(f"{name} {error:.1e} (< {limits[name]:.1e})" for name, error in errors.items())
    assert all(error < limits[name] for name, error in errors.items()), listed


def _zero(rows):
    q, v = rows["q"], rows["v"]
    return q.new_zeros(q.shape[1], q.shape[2], v.shape[2])


def _recurrence(rows, state, scale):
    outs = []
    for t in range(rows["q"].shape[0]):
        state = _decay(rows, t, state)
        k, v = rows["k"][t], rows["v"][t]
        if "beta" in rows:
            v = rows["beta"][t][:, None] * (v - torch.einsum("hkv,hk->hv", state, k))
        state = state + k[:, :, None] * v[:, None, :]
        outs.append(scale * torch.einsum("hkv,hk->hv", state, rows["q"][t]))
    return torch.stack(outs), state


def _decay(rows, t, state):
    if "log_decay" not in rows:
        return state
    g = rows["log_decay"]
    g = g if g.ndim == 1 else g[t]
    return state * g.exp().reshape(*g.shape, *[1] * (3 - g.ndim))


def _transition(rows, state):
    length = rows["q"].shape[0]
    if "beta" in rows:
        matrix = torch.eye(state.shape[1], dtype=state.dtype).expand(state.shape[0], -1, -1)
        for t in range(length):
            matrix = _decay(rows, t, matrix)
            k = rows["k"][t]
            read = torch.einsum("hk,hkc->hc", k, matrix) * rows["beta"][t][:, None]
            matrix = matrix - k[:, :, None] * read[:, None, :]
        return matrix
    if "log_decay" not in rows:
        return None
    g = rows["log_decay"]
    return g * length if g.ndim == 1 else g.sum(0)
