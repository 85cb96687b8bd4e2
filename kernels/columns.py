"""What more than one kernel uses of table.py, as Triton wants its globals; _AT: of an address.

As constexprs they count in the key of Triton's compile cache: no kernel compiled for another layout
is ever taken for this one's.
"""

from __future__ import annotations

import triton.language as tl

from . import table as t

GROUP_WORDS = tl.constexpr(t.GROUP_WORDS)
TENSOR_WORDS = tl.constexpr(t.TENSOR_WORDS)
SCALARS = tl.constexpr(t.SCALARS)
RANDOM_GROUP = tl.constexpr(t.RANDOM_GROUP)
MEASURES = tl.constexpr(t.MEASURES)
ACTIVE = tl.constexpr(t.ACTIVE)
GRAD_FACTOR = tl.constexpr(t.GRAD_FACTOR)
UNSCALE = tl.constexpr(t.UNSCALE)
W1 = tl.constexpr(t.W1)
W2 = tl.constexpr(t.W2)
RSQRT_BIAS2 = tl.constexpr(t.RSQRT_BIAS2)
EPSILON = tl.constexpr(t.EPSILON)
NEG_STEP_SIZE = tl.constexpr(t.NEG_STEP_SIZE)
DECAY = tl.constexpr(t.DECAY)
L2 = tl.constexpr(t.L2)
KEY0 = tl.constexpr(t.KEY0)
KEY1 = tl.constexpr(t.KEY1)
PARAM_AT = tl.constexpr(t.PARAM)
EXP_AVG_AT = tl.constexpr(t.EXP_AVG)
EXP_AVG_SQ_AT = tl.constexpr(t.EXP_AVG_SQ)
MAX_EXP_AVG_SQ_AT = tl.constexpr(t.MAX_EXP_AVG_SQ)
MASTER_AT = tl.constexpr(t.MASTER)
EXP_AVG_SCALE_AT = tl.constexpr(t.EXP_AVG_SCALE)
EXP_AVG_SQ_SCALE_AT = tl.constexpr(t.EXP_AVG_SQ_SCALE)
MAX_EXP_AVG_SQ_SCALE_AT = tl.constexpr(t.MAX_EXP_AVG_SQ_SCALE)
NUMEL = tl.constexpr(t.NUMEL)
SIGNATURE = tl.constexpr(t.SIGNATURE)
QUANT_BLOCK = tl.constexpr(t.QUANT_BLOCK)
