//! What the kernel can, of what a mode needs. Asking makes the kernel load what it has.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result};
use husk_dataplane::nft::CounterValue;
use husk_dataplane::wireguard::Wireguard;
use husk_dataplane::{Error, xfrm};
use husk_overlay::config::{Config, WireguardChoice};
use husk_overlay::facts::WireguardSupport;
use husk_overlay::marks;
use husk_overlay::mode::Mode;
use husk_overlay::mtu::EspMode;

use crate::report::Counter;

/// What is known of the kernel.
#[derive(Debug, Default)]
pub(super) struct Support {
    wireguard: Option<WireguardSupport>,
    /// Whether it has the ESP that the mode needs, or why not.
    esp: Option<Result<(), String>>,
    /// When it was last asked for ESP.
    asked: Option<Instant>,
}

/// How long the word counts that a kernel has no ESP: somebody may be loading the modules.
const ASK_AGAIN: Duration = Duration::from_secs(15);

impl Support {
    /// How WireGuard can be had; asked once, a module that is loaded later is found by the next daemon.
    pub(super) fn wireguard(&mut self, config: &Config) -> Result<WireguardSupport> {
        if let Some(support) = &self.wireguard {
            return Ok(support.clone());
        }
        let sockets = Path::new(marks::WIREGUARD_SOCKET_DIRECTORY);
        let kernel = Wireguard::open(sockets).and_then(|mut wireguard| wireguard.kernel_support());
        let support = support_of(kernel, Path::new("/dev/net/tun").exists())
            .context("cannot find out whether the kernel has WireGuard")?;
        let chosen = match (config.wireguard.device, &support) {
            (WireguardChoice::Userspace, _) | (WireguardChoice::Auto, WireguardSupport::Userspace) => "userspace",
            (_, WireguardSupport::Kernel) => "kernel",
            _ => "none",
        };
        tracing::info!(device = chosen, configured = ?config.wireguard.device, "chose the WireGuard device");
        self.wireguard = Some(support.clone());
        Ok(support)
    }

    /// Why the kernel cannot do what the mode needs of ESP, if so; asked again as long as it cannot.
    pub(super) fn esp_unavailable(&mut self, config: &Config) -> Result<Option<String>> {
        let outdated = self.asked.is_none_or(|asked| asked.elapsed() >= ASK_AGAIN);
        if !matches!(self.esp, Some(Ok(()))) && outdated {
            self.asked = Some(Instant::now());
            let needs = xfrm::Needs {
                families: BTreeSet::from([config.underlay.family]),
                cipher: config.ipsec.cipher,
                mode: if config.mode == Mode::Ipsec { EspMode::Tunnel } else { EspMode::Transport },
                udp: config.ipsec.udp_port.is_some(),
            };
            let support = match xfrm::support(&needs) {
                Ok(()) => Ok(()),
                Err(error @ Error::Unsupported { .. }) => Err(format!("{error}; {}", error.remedy())),
                Err(error) => return Err(error).context("cannot find out whether the kernel has ESP"),
            };
            if self.esp.as_ref() != Some(&support) {
                tracing::info!(available = support.is_ok(), cipher = %needs.cipher, "asked the kernel for ESP");
            }
            self.esp = Some(support);
        }
        Ok(self.esp.as_ref().and_then(|support| support.as_ref().err().cloned()))
    }
}

/// Only a kernel that says so has no WireGuard; one that gave no answer is asked again, by the next pass.
pub(super) fn support_of(kernel: Result<(), Error>, tun: bool) -> Result<WireguardSupport, Error> {
    match kernel {
        Ok(()) => Ok(WireguardSupport::Kernel),
        Err(Error::Unsupported { .. }) if tun => Ok(WireguardSupport::Userspace),
        Err(error @ Error::Unsupported { .. }) => {
            Ok(WireguardSupport::Unavailable { reason: format!("{error}; and /dev/net/tun does not exist") })
        }
        Err(error) => Err(error),
    }
}

/// Counters as they are reported; none where they cannot be read, which the log tells.
pub(super) fn counters(read: Result<BTreeMap<String, CounterValue>, Error>, what: &str) -> BTreeMap<String, Counter> {
    let counter =
        |(name, value): (String, CounterValue)| (name, Counter { packets: value.packets, bytes: value.bytes });
    match read {
        Ok(counters) => counters.into_iter().map(counter).collect(),
        Err(error) => {
            tracing::warn!(%error, "{what} cannot be read");
            BTreeMap::new()
        }
    }
}
