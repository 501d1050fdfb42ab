//! IPsec as the kernel has it: associations, as `ip xfrm` shows them, and the counters of what was dropped.

use std::collections::BTreeMap;
use std::fs;
use std::net::IpAddr;

use anyhow::{Context, Result};

use crate::netns::Netns;

/// A security association.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct State {
    /// Who sends.
    pub source: IpAddr,
    /// Who receives.
    pub destination: IpAddr,
    /// SPI.
    pub spi: u32,
    /// Key in hexadecimal digits; none of an association that the kernel only asks for.
    pub key: Option<String>,
    /// Packets so far.
    pub packets: u64,
    /// When it was installed, as `ip` prints it.
    pub added: String,
}

/// The associations of a namespace, those that only were asked for excepted.
///
/// # Errors
/// When `ip` fails or says what this does not understand.
pub fn states(netns: &Netns) -> Result<Vec<State>> {
    let text = netns.command("ip", ["-s", "xfrm", "state"])?;
    let mut states = parse(&text).with_context(|| format!("in this answer of `ip -s xfrm state`:\n{text}"))?;
    states.retain(|state| state.key.is_some());
    states.sort();
    Ok(states)
}

fn parse(text: &str) -> Result<Vec<State>> {
    let mut states: Vec<State> = Vec::new();
    let mut in_counters = false;
    for line in text.lines() {
        let words: Vec<_> = line.split_whitespace().collect();
        match *words.as_slice() {
            ["src", source, "dst", destination, ..] if !line.starts_with([' ', '\t']) => {
                let (source, destination) = (source.parse()?, destination.parse()?);
                states.push(State { source, destination, spi: 0, key: None, packets: 0, added: String::new() });
                in_counters = false;
                continue;
            }
            _ => {}
        }
        let Some(state) = states.last_mut() else { continue };
        match *words.as_slice() {
            ["proto", "esp", "spi", spi, ..] => {
                let digits = spi.split('(').next().unwrap_or(spi).trim_start_matches("0x");
                state.spi = u32::from_str_radix(digits, 16).with_context(|| format!("the SPI {spi}"))?;
            }
            ["aead", _, key, ..] => state.key = Some(key.trim_start_matches("0x").to_owned()),
            // The counters are the second line below, `123(bytes), 4(packets)`.
            ["lifetime", "current:", ..] => in_counters = true,
            [_, packets] if in_counters && packets.ends_with("(packets)") => {
                let number = packets.trim_end_matches("(packets)");
                state.packets = number.parse().with_context(|| format!("the counter {packets}"))?;
                in_counters = false;
            }
            ["add", date, time, ..] => state.added = format!("{date} {time}"),
            _ => {}
        }
    }
    Ok(states)
}

/// The counters of `/proc/net/xfrm_stat` that are not zero.
///
/// # Errors
/// When the kernel has none.
pub fn counters(netns: &Netns) -> Result<BTreeMap<String, u64>> {
    let text = netns.run(|| fs::read_to_string("/proc/thread-self/net/xfrm_stat"))?.context("reading net/xfrm_stat")?;
    let mut counters = BTreeMap::new();
    for line in text.lines() {
        let (name, value) = line.split_once(char::is_whitespace).context("net/xfrm_stat has names and numbers")?;
        let value = value.trim().parse().with_context(|| format!("the counter {name}"))?;
        if value > 0 {
            counters.insert(name.to_owned(), value);
        }
    }
    Ok(counters)
}

/// A counter of `/proc/net/xfrm_stat`, for example `XfrmInStateSeqError`.
///
/// # Errors
/// As [`counters`].
pub fn counter(netns: &Netns, name: &str) -> Result<u64> {
    Ok(counters(netns)?.get(name).copied().unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_of_ip_is_understood() {
        let text = "src 192.0.2.1 dst 192.0.2.2\n\
            \tproto esp spi 0x00000abc(2748) reqid 1752527723(0x6875736b) mode tunnel\n\
            \treplay-window 0 seq 0x00000000 flag af-unspec esn (0x10100000)\n\
            \taead rfc4106(gcm(aes)) 0x00112233445566778899aabbccddeeff00112233 (160 bits) 128\n\
            \tlifetime config:\n\t  limit: soft (INF)(bytes), hard (INF)(bytes)\n\
            \tlifetime current:\n\t  840(bytes), 10(packets)\n\t  add 2026-01-01 00:00:00 use -\n\
            src 2001:db8::1 dst 2001:db8::2\n\tproto esp spi 0x00000000(0) reqid 0(0x00000000) mode tunnel\n";
        let states = parse(text).unwrap();
        assert_eq!(states.len(), 2);
        assert_eq!((states[0].spi, states[0].packets), (0xabc, 10));
        assert_eq!(states[0].key.as_deref(), Some("00112233445566778899aabbccddeeff00112233"));
        assert_eq!(states[0].added, "2026-01-01 00:00:00");
        assert_eq!(states[1].key, None);
    }
}
