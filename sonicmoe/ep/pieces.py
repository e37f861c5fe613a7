"""The order of one call's steps: what is begun, what runs beside it, what waits."""


def cut(tensor, pieces: int) -> list:
    """[T,..] in consecutive parts, as even as can be, some of them empty where there are fewer rows."""
    if pieces == 1:
        return [tensor]
    n_rows = int(tensor.shape[0])
    bounds = [n_rows * number // pieces for number in range(pieces + 1)]
    return [tensor[lo:hi].contiguous() for lo, hi in zip(bounds, bounds[1:], strict=False)]


def run_pieces(tape, pieces, open_calls, experts, beside=None):
    """([T,H] of each piece, what ``beside`` made) for ``pieces`` of (x, probs, indices).

    All pieces are planned together, since the host waits for that, and all dispatches begin before the experts of the
    first piece. A piece goes back while the next is computed.
    ``beside`` runs while tokens travel.

    The tape runs it backwards: a gradient leaves, others are computed, and it is waited for where it is needed.
    """
    under_way = []
    for (x, probs, _), call in zip(pieces, open_calls(pieces), strict=True):
        under_way.append((tape.begin_dispatch(x, probs, call), x, call))
    extra = None if beside is None else beside()
    going_back = []
    for ticket, x, call in under_way:
        rows, row_probs = tape.finish_dispatch(ticket, x, call)
        going_back.append((tape.begin_combine(experts(rows, row_probs, call), call), call))
    return [tape.finish_combine(ticket, call) for ticket, call in going_back], extra
