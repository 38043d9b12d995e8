"""Views: read models folded from the event stream, and the servers that speak for them.

Nothing here touches the log: events come through :mod:`space.projections.feed`, and a write that arrives
through a view goes back to the start as a command.
"""
