//! A pod: a network namespace that the plugin attaches to the overlay and detaches from it.

use std::borrow::Borrow;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result};
use husk_overlay::prefix::Family;
use serde_json::Value;

use crate::cni::{CniOutcome, PodSpec};
use crate::host::{Host, Place};
use crate::netns::Netns;
use crate::probe::{Echo, EchoServer};
use crate::{eventually, patience};

/// How long an answer may be under way.
const ANSWER_LIMIT: Duration = Duration::from_millis(100);

/// A pod's sandbox. Dropping it removes the namespace without DEL, as when a runtime crashes; say [`Pod::del`] first
/// where the end matters.
#[derive(Debug)]
pub struct Pod {
    // Before `place`: what a namespace is removed from has to be there still.
    netns: Netns,
    spec: PodSpec,
    result: Value,
    place: Arc<Place>,
}

impl Pod {
    pub(crate) fn sandbox(place: &Arc<Place>, name: &str) -> Result<Self> {
        let netns = Netns::create(&place.scope.name(&format!("{}-{name}", place.name)))?;
        place.show(&netns)?;
        let spec = PodSpec::new(name, netns.name(), &netns.path());
        Ok(Self { netns, spec, result: Value::Null, place: Arc::clone(place) })
    }

    /// The pod's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// The pod's network namespace.
    #[must_use]
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The attachment as the runtime names it.
    #[must_use]
    pub fn spec(&self) -> &PodSpec {
        &self.spec
    }

    /// For tests that play a strange runtime.
    pub fn spec_mut(&mut self) -> &mut PodSpec {
        &mut self.spec
    }

    /// Result of the last successful ADD; `Null` before.
    #[must_use]
    pub fn result(&self) -> &Value {
        &self.result
    }

    /// Calls ADD and remembers its result if it succeeds.
    ///
    /// # Errors
    /// When the plugin cannot be run; its refusal is an outcome.
    pub fn add(&mut self) -> Result<CniOutcome> {
        let outcome = self.call("ADD")?;
        if outcome.success() {
            self.result = outcome.json.clone();
            self.spec.prev_result = Some(outcome.json.clone());
        }
        Ok(outcome)
    }

    /// Calls DEL. The attachment is remembered, so that it can be called again.
    ///
    /// # Errors
    /// As [`Pod::add`].
    pub fn del(&self) -> Result<CniOutcome> {
        self.call("DEL")
    }

    /// Calls CHECK.
    ///
    /// # Errors
    /// As [`Pod::add`].
    pub fn check(&self) -> Result<CniOutcome> {
        self.call("CHECK")
    }

    /// The pod's addresses, as the result of ADD lists them.
    #[must_use]
    pub fn addresses(&self) -> Vec<IpAddr> {
        let listed = self.result["ips"].as_array().into_iter().flatten();
        listed.filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok()).collect()
    }

    /// The pod's address of a family.
    ///
    /// # Errors
    /// When ADD gave it none.
    pub fn address(&self, family: Family) -> Result<IpAddr> {
        let found = self.addresses().into_iter().find(|address| Family::of(*address) == family);
        found.with_context(|| format!("pod {} has no {family} address: {}", self.name(), self.result))
    }

    /// Waits until another pod answers over both families.
    ///
    /// # Errors
    /// When it does not in time.
    pub fn await_answer_of(&self, other: &Self, limit: Duration) -> Result<()> {
        Family::ALL.into_iter().try_for_each(|family| {
            let awaited = self.await_answer_at(other.address(family)?, limit);
            awaited.with_context(|| format!("{family} to {}", other.netns.name()))
        })
    }

    /// Waits until somebody answers at an address.
    ///
    /// # Errors
    /// When nobody does in time.
    pub fn await_answer_at(&self, to: IpAddr, limit: Duration) -> Result<()> {
        let what = format!("{} to reach {to}", self.netns.name());
        eventually(&what, limit, || self.asked(to, ANSWER_LIMIT))
    }

    /// Whether another pod answers over both families, asked once. Each answer may take as long as `limit`.
    ///
    /// # Errors
    /// When the pod cannot be asked, or has no address of a family.
    pub fn reaches(&self, other: &Self, limit: Duration) -> Result<bool> {
        for family in Family::ALL {
            if !self.asked(other.address(family)?, limit)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn asked(&self, to: IpAddr, limit: Duration) -> Result<bool> {
        Ok(Echo::to(to).limit(patience(limit)).run(&self.netns)?.arrived())
    }

    /// The MTU that the kernel has for the pod's interface.
    ///
    /// # Errors
    /// When the interface is missing.
    pub fn mtu(&self) -> Result<usize> {
        self.netns.mtu(&self.spec.ifname)
    }

    fn call(&self, command: &str) -> Result<CniOutcome> {
        self.place.cni(command, Some(&self.spec), self.place.plugin_config(Some(&self.spec))?)
    }
}

/// Waits until each of these pods has an answer from every other.
///
/// # Errors
/// When one has not in time, which is counted for each pair and family by itself.
pub fn await_answers_among<P: Borrow<Pod>>(pods: &[P], limit: Duration) -> Result<()> {
    let pods = || pods.iter().map(P::borrow);
    let pairs = pods().flat_map(|from| pods().map(move |to| (from, to)));
    pairs.filter(|(from, to)| !std::ptr::eq(*from, *to)).try_for_each(|(from, to)| from.await_answer_of(to, limit))
}

/// A pod with a server in it. The server goes first when both are dropped.
#[derive(Debug)]
pub struct Served {
    /// The server.
    pub server: EchoServer,
    /// Its pod.
    pub pod: Pod,
}

impl Served {
    /// Makes a pod, attaches it and starts the server.
    ///
    /// # Errors
    /// As [`Host::add_pod`], and when the server does not start.
    pub fn start(host: &Host, name: &str) -> Result<Self> {
        let pod = host.add_pod(name)?;
        Ok(Self { server: EchoServer::start(pod.netns())?, pod })
    }
}
