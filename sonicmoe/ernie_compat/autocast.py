"""What runs here chooses its types itself: ``paddle.amp.auto_cast`` would narrow the float32 sums in between, and
``main_grad`` with them.
"""

from contextlib import nullcontext

import paddle

_AS_IT_IS = nullcontext()


def without_autocast():
    """Run the block with ``auto_cast`` off."""
    if not paddle.is_autocast_enabled():
        return _AS_IT_IS
    # By its own type: Paddle remembers the last one that it was told, and GradScaler looks there.
    return paddle.amp.auto_cast(enable=False, dtype=paddle.get_autocast_dtype())
