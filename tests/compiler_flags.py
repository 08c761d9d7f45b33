# SPDX-License-Identifier: Apache-2.0
"""How the tests have XLA compile: in the least time, with flags that this jaxlib knows.

XLA ends the process at a flag that it does not know.
"""

import jaxlib.version

# Before jaxlib 0.11 older emitters of fused loops take a third less processor time than the new
# ones to make the same programs. One part of a program is made faster than several in turns.
_OLD_EMITTERS = jaxlib.version.__version_info__ < (0, 11)
TESTS = (
    "--xla_backend_optimization_level=0",
    *(("--xla_cpu_use_fusion_emitters=false",) if _OLD_EMITTERS else ()),
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_llvm_disable_expensive_passes=true",
)
# Options of one program that set its emitters to what users have.
AS_USERS = {"xla_cpu_use_fusion_emitters": True} if _OLD_EMITTERS else {}
