"""The hook of DeepInversion and its many descendants, under the names it goes by."""

from .batchnorm import BatchNormHook


class DeepInversionFeatureHook(BatchNormHook):
    """`BatchNormHook` as DeepInversion, breaching and the GradInversion family call it."""


class BNFeatureHook(BatchNormHook):
    """`BatchNormHook` as SRe2L, CDA, SCDD, DWA, LPLD, CV-DD and FADRM call it."""
