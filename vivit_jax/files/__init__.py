# SPDX-License-Identifier: Apache-2.0
"""Reading and writing files safely: whole or not at all, of bounded size, never a FIFO."""
