//! The one place where ABI types become what aya moves in and out of maps.

/// An ABI value for aya's typed maps.
#[repr(transparent)]
#[derive(Clone, Copy, Debug)]
pub struct AsPod<T>(pub T);

// SAFETY: bytemuck's `Pod` promises what aya's asks for: no padding, no invalid bit patterns, no pointers; the
// wrapper is transparent.
unsafe impl<T: bytemuck::Pod> aya::Pod for AsPod<T> {}
