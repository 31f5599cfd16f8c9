"""The kinds of torch's layers that the checks tell apart."""

from torch import nn

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# layers that scale what they get
NORMS = (*BATCH_NORMS, *INSTANCE_NORMS, nn.LayerNorm, nn.GroupNorm)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
# layers whose outputs have the units in dimension 1
WITH_CHANNELS = (*CONVOLUTIONS, *BATCH_NORMS, *INSTANCE_NORMS, nn.GroupNorm)
# layers whose weights have a row for each unit
WITH_ROWS = (
    nn.Linear,
    nn.Bilinear,
    *CONVOLUTIONS,
    nn.RNNBase,
    nn.RNNCellBase,
    nn.MultiheadAttention,
)
