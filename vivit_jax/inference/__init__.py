# SPDX-License-Identifier: Apache-2.0
"""What a trained model is used for: classes, features, attention maps, reconstruction, export."""
