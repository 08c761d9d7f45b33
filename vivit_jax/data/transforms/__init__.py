# SPDX-License-Identifier: Apache-2.0
"""What happens to decoded frames: processors, resizing, augmentation."""
