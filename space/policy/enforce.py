"""What a policy forbids a view: content must not be seen from further away than its sovereignty says.

``local`` content stays on its node: a view that only this machine can reach may show it, one that listens on the
network may not.  ``zone`` and ``global`` content may be seen by whoever reaches the node; who that is, certificates,
host lists and export rules say.  Shipping to other zones is :mod:`space.federation.selection`'s.
"""

from __future__ import annotations

import enum
import ipaddress
from typing import final

from space.policy.model import Policy, Sovereignty


@final
class Reach(enum.Enum):
    """From where a view can be reached."""

    MACHINE = "this machine"
    NETWORK = "the network"


def reach_of(host: str) -> Reach:
    """From where a listener at a host or address can be reached; a name but localhost may mean anything."""
    try:
        local = ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        local = host == "localhost"
    return Reach.MACHINE if local else Reach.NETWORK


def view_refusal(policy: Policy, reach: Reach) -> str:
    """Why a view must not show content of that policy; empty if it may."""
    if policy.sovereignty is Sovereignty.LOCAL and reach is Reach.NETWORK:
        return "its policy keeps it on this node (sovereignty: local), and the view can be reached from the network"
    return ""
