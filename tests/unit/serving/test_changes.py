"""Who waits for a job is woken from any thread, and from a signal in the midst of it."""

from __future__ import annotations

import threading

from limner.serving.changes import Changes


def test_a_thread_that_is_told_to_end_meanwhile_does_not_wait_for_itself() -> None:
    """A signal's handler runs in the thread of the event loop, wherever that is."""
    changes = Changes()

    def interrupted() -> None:
        with changes._lock:
            changes.tell_all()

    thread = threading.Thread(target=interrupted, daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
