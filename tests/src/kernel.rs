//! What the running kernel can do, by its own word and without Husk: some cases need more than every kernel has.

use anyhow::{Context, Result, bail};

use crate::netns::Netns;
use crate::scope::Scope;

/// A part of the kernel that not all kernels have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The WireGuard device.
    Wireguard,
    /// ESP with AES-GCM, and the xfrm interface.
    Esp,
}

impl Part {
    /// What an `ip -batch` does that works only with this part.
    fn attempt(self) -> &'static str {
        match self {
            Self::Wireguard => "link add probe0 type wireguard\n",
            Self::Esp => {
                "link add probe0 type xfrm dev lo if_id 0x7f\n\
                 xfrm state add src 192.0.2.1 dst 192.0.2.2 proto esp spi 0x7f0 reqid 1 mode tunnel \
                 aead rfc4106(gcm(aes)) 0x0000000000000000000000000000000000000000 128\n"
            }
        }
    }
}

/// True if the kernel has it; tried in a namespace that is gone afterwards.
///
/// # Errors
/// When namespaces cannot be made.
pub fn has(part: Part) -> Result<bool> {
    let scope = Scope::new()?;
    let netns = Netns::create(&scope.name("kernel"))?;
    let tried = netns.program("ip").args(["-batch", "-"]).stdin(part.attempt()).run()?;
    Ok(tried.status.success())
}

/// Makes sure that the kernel has these parts.
///
/// # Errors
/// When it lacks one; the error says where the case belongs.
pub fn require(parts: &[Part]) -> Result<()> {
    for part in parts {
        if !has(*part).with_context(|| format!("asking the kernel for {part:?}"))? {
            bail!(
                "this kernel lacks {part:?}, which the case is about: run it with `hack/test --tier vm`, or by `hack/vm --`"
            );
        }
    }
    Ok(())
}

/// Version of the running kernel: its first two numbers.
///
/// # Errors
/// When the kernel does not say, or says it in another form.
pub fn release() -> Result<(u32, u32)> {
    let text = std::fs::read_to_string("/proc/sys/kernel/osrelease").context("reading the kernel's version")?;
    let mut numbers = text.split(|it: char| !it.is_ascii_digit()).map(str::parse);
    match (numbers.next(), numbers.next()) {
        (Some(Ok(major)), Some(Ok(minor))) => Ok((major, minor)),
        _ => bail!("{text:?} is no version of a kernel"),
    }
}
