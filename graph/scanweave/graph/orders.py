"""Node orders by name.

ORDERS           name -> function
resolve_order    name or function(s) -> functions
order_name       functions -> a short name
"""

from collections.abc import Sequence

from .centrality import eigenvector_order, kcore_order, ppr_order
from .ordering import (
    Order,
    bfs_order,
    degree_order,
    index_order,
    pagerank_order,
    random_order,
    rcm_order,
)
from .spectral import fiedler_order

ORDERS: dict[str, Order] = {
    "bfs": bfs_order,
    "degree": degree_order,
    "eigenvector": eigenvector_order,
    "fiedler": fiedler_order,
    "index": index_order,
    "kcore": kcore_order,
    "pagerank": pagerank_order,
    "ppr": ppr_order,
    "random": random_order,
    "rcm": rcm_order,
}


def resolve_order(order: str | Order | Sequence[str | Order]) -> tuple[Order, ...]:
    """Turn names into functions; several orders are compared one after another.

    Args:
        order: A name in `ORDERS`, a function, or a sequence of those, the first decides first.

    Raises:
        ValueError: no order has this name, or the sequence is empty.
    """
    if isinstance(order, str):
        if order not in ORDERS:
            raise ValueError(
                f"order must be a function or one of {', '.join(ORDERS)}, got {order!r}"
            )
        return (ORDERS[order],)
    if callable(order):
        return (order,)
    functions = tuple(function for item in order for function in resolve_order(item))
    if not functions:
        raise ValueError("order must hold at least one name or function, got an empty sequence")
    return functions


def order_name(orders: Sequence[Order]) -> str:
    """Short name for `repr`: `degree`, `degree+bfs`, or the class of a callable object."""
    names = (getattr(order, "__name__", type(order).__name__) for order in orders)
    return "+".join(name.removesuffix("_order") for name in names)
