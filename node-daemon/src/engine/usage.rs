//! What use is made of keys, as the kernel counts it: read at the start of a pass, before the plan that decides on keys.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use husk_dataplane::kernel::{Actual, Kernel, Table};
use husk_dataplane::wireguard::{WireguardPeerStatus, WireguardState};
use husk_dataplane::xfrm::ActualXfrmState;
use husk_overlay::config::{Config, WireguardChoice};
use husk_overlay::facts::{AssociationUse, Facts, SessionUse, WireguardSupport};
use husk_overlay::kernel::{Desired, WireguardDevice, XfrmStateKey};
use husk_overlay::keys::PublicKey;
use husk_overlay::marks;

use super::quiet::{Measure, Quiet, Watched, is_use};

/// Counters seen so far.
#[derive(Debug, Default)]
pub(super) struct Counted {
    associations: Quiet<XfrmStateKey>,
    sessions: Quiet<SessionCounter>,
    /// Own key and peer's key of every completed handshake, as long as the device has both: a userspace device forgets when
    /// its sessions expire.
    handshaken: BTreeSet<(PublicKey, PublicKey)>,
    /// The last handshake under every key of a peer, as time since the Unix epoch.
    handshakes: BTreeMap<PublicKey, Duration>,
}

/// One of the counters of bytes that a device keeps of a peer's key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct SessionCounter {
    key: PublicKey,
    sent: bool,
    measure: Measure,
}

impl Counted {
    /// What is known of sessions with peers, over all devices.
    pub(super) fn sessions<'a>(
        &mut self,
        now: Duration,
        devices: impl Iterator<Item = (&'a WireguardState, bool)>,
    ) -> BTreeMap<PublicKey, SessionUse> {
        let mut bytes = BTreeMap::new();
        let mut sessions = BTreeMap::<PublicKey, SessionUse>::new();
        let mut handshaken = BTreeSet::new();
        self.handshakes.clear();
        for (device, userspace) in devices {
            let Some(own) = device.public_key else { continue };
            let received = if userspace { Measure::Payload } else { Measure::Message };
            for (key, status) in &device.status {
                let key = *key;
                bytes.insert(SessionCounter { key, sent: false, measure: received }, status.received_bytes);
                bytes.insert(SessionCounter { key, sent: true, measure: Measure::Message }, status.sent_bytes);
                let session = sessions.entry(key).or_insert(SessionUse { handshaken: false, quiet: Duration::MAX });
                if let Some(at) = status.last_handshake {
                    let latest = self.handshakes.entry(key).or_default();
                    *latest = at.max(*latest);
                }
                if self.handshaken.contains(&(own, key)) || has_completed_handshake(status, userspace) {
                    handshaken.insert((own, key));
                    session.handshaken = true;
                }
            }
        }
        self.handshaken = handshaken;
        for (counter, watched) in self.sessions.observe(now, &bytes, |counter, step| is_use(step, counter.measure)) {
            if let Some(session) = sessions.get_mut(&counter.key) {
                session.quiet = session.quiet.min(watched.quiet);
            }
        }
        sessions
    }

    /// The last handshake under a peer's key, as time since the Unix epoch; none if the devices, when last looked at, knew of none.
    pub(super) fn last_handshake(&self, key: &PublicKey) -> Option<Duration> {
        self.handshakes.get(key).copied()
    }

    /// What is known of associations.
    pub(super) fn associations(
        &mut self,
        now: Duration,
        states: &BTreeMap<XfrmStateKey, ActualXfrmState>,
    ) -> BTreeMap<XfrmStateKey, AssociationUse> {
        // One that is set up differently is none of ours: it is swept.
        let states: BTreeMap<_, _> = states.iter().filter(|(_, state)| state.parameters.is_some()).collect();
        let packets = states.iter().map(|(key, state)| (**key, state.packets)).collect();
        let watched = self.associations.observe(now, &packets, |_, _| true);
        let used = |(key, state): (&XfrmStateKey, &ActualXfrmState)| {
            let &ActualXfrmState { source, packets, bytes, undecryptable, .. } = state;
            let Watched { quiet, age } = watched.get(key).copied().unwrap_or_default();
            (*key, AssociationUse { source, packets, bytes, undecryptable, quiet, age })
        };
        states.into_iter().map(used).collect()
    }

    /// Puts into the facts what the kernel counts. Without a word of the WireGuard devices, `known` stays what is known of
    /// sessions: what cannot be read now will be an issue when it cannot be changed.
    ///
    /// # Errors
    /// When associations cannot be read: those that are there would be taken for lost.
    pub(super) fn fill(
        &mut self,
        kernel: &mut impl Kernel,
        config: &Config,
        facts: &mut Facts,
        known: Option<&Facts>,
    ) -> Result<(), husk_dataplane::Error> {
        let mut actual = Actual::default();
        if !facts.wireguard_epochs.is_empty() {
            let devices = devices_of(config, facts);
            facts.sessions = match kernel.read(Table::Wireguard, &devices, &mut actual) {
                Ok(()) => self.sessions(facts.uptime, with_kind(&devices, &actual)),
                Err(error) => {
                    tracing::debug!(%error, "sessions with peers cannot be looked at");
                    known.map(|known| known.sessions.clone()).unwrap_or_default()
                }
            };
        }
        if let Some(esp) = facts.esp.as_mut().filter(|esp| esp.unavailable.is_none()) {
            kernel.read(Table::XfrmStates, &Desired::default(), &mut actual)?;
            esp.installed = self.associations(facts.uptime, &actual.xfrm_states);
        }
        Ok(())
    }
}

/// Bytes of the message that starts a handshake (WireGuard paper, section 5.4.2).
const INITIATION: u64 = 148;

/// Each side can receive from the other. The kernel shows a handshake to its responder only with the first packet under the
/// new keys; a userspace device already when it has answered, having received nothing but initiations.
fn has_completed_handshake(status: &WireguardPeerStatus, userspace: bool) -> bool {
    status.last_handshake.is_some() && !(userspace && status.received_bytes.is_multiple_of(INITIATION))
}

/// Devices as read, with whether they are userspace ones.
pub(super) fn with_kind<'a>(
    desired: &'a Desired,
    actual: &'a Actual,
) -> impl Iterator<Item = (&'a WireguardState, bool)> {
    let userspace = |interface| desired.wireguard.get(interface).is_some_and(|device| device.userspace);
    actual.wireguard.iter().map(move |(interface, state)| (state, userspace(interface)))
}

/// The devices of the generations whose keys the node holds, as far as it takes to read them.
fn devices_of(config: &Config, facts: &Facts) -> Desired {
    let userspace = match config.wireguard.device {
        WireguardChoice::Userspace => true,
        WireguardChoice::Auto => facts.wireguard == Some(WireguardSupport::Userspace),
        WireguardChoice::Kernel => false,
    };
    let device = |(generation, own): (&u64, &husk_overlay::facts::OwnEpoch)| {
        let listen_port = config.wireguard.port_of(marks::wireguard_slot(*generation));
        let device = WireguardDevice { userspace, public_key: own.public_key, listen_port, peers: BTreeMap::new() };
        (marks::wireguard_interface(*generation), device)
    };
    Desired { wireguard: facts.wireguard_epochs.iter().map(device).collect(), ..Desired::default() }
}
