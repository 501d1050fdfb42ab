//! The keys of the configuration, and what each may be.

mod cluster;
mod http;
mod logs;
mod tunnels;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::PathBuf;
use std::str::FromStr;

use super::reader::{Complaint, Fields, Problems, UnknownKeys};
use super::{
    BlockLengths, CniConfig, Config, ConfigError, ConfigErrors, LogConfig, LogFormat, LogLevel, Problem, UnderlayConfig,
};
use crate::marks;
use crate::mode::Mode;
use crate::mtu;
use crate::name::InterfaceName;
use crate::prefix::{Family, Prefix, PrefixError};
use crate::record::DualStack;
use crate::yaml::{self, Value};

/// Longest configuration in bytes; the documented example has three thousand.
const MAX_TEXT: usize = 1 << 20;

const CIDR_EXAMPLE: &str = "clusterCIDRs: [10.42.0.0/16, \"fd42::/48\"]";

pub(super) fn parse(file_name: &str, text: &str) -> Result<Config, ConfigErrors> {
    let tree = read_tree(text).map_err(|reason| {
        ConfigErrors(vec![ConfigError {
            file: file_name.to_owned(),
            key: String::new(),
            problem: Problem::Syntax,
            value: None,
            reason,
            remedy: "correct the YAML there".to_owned(),
        }])
    })?;
    let mut problems = Problems::new(file_name);
    let config = read(Fields::of_document(&tree, &mut problems, UnknownKeys::Refused));
    if problems.is_empty() { Ok(config) } else { Err(ConfigErrors(problems.into_errors())) }
}

fn read_tree(text: &str) -> Result<Value, String> {
    if text.len() > MAX_TEXT {
        return Err(format!("the text has {} bytes, and no configuration has more than {MAX_TEXT}", text.len()));
    }
    yaml::document(text)
}

/// Reads all keys. After a problem the configuration holds a default in its place, and is not used.
fn read(mut top: Fields<'_, '_>) -> Config {
    let mut config = Config::new(Vec::new());
    if let Some(mode) = read_mode(&mut top) {
        config.mode = mode;
    }
    let cidrs = read_cluster_cidrs(&mut top);
    config.block_lengths = read_block_lengths(&mut top, &cidrs);

    let mut node = top.section("node");
    config.node_name = node.parsed("name", "a node name", "use the name the node has in the cluster");
    node.finish();

    config.underlay = read_underlay(&mut top, &cidrs);
    config.source = cluster::read_source(&mut top);
    config.vxlan = tunnels::read_vxlan(&mut top);
    config.wireguard = tunnels::read_wireguard(&mut top, config.vxlan);
    config.ipsec = tunnels::read_ipsec(&mut top, &config);
    config.rotation = tunnels::read_rotation(&mut top);
    config.masquerade = top.flag("masquerade").unwrap_or(config.masquerade);

    config.policy = cluster::read_policy(&mut top);
    config.ipam = cluster::read_ipam(&mut top, &config.source);

    config.cni = read_cni(&mut top);
    config.log = read_log(&mut top);
    config.logs = logs::read_logs(&mut top);
    config.metrics = http::read_metrics(&mut top);
    config.ui = http::read_ui(&mut top, &config.metrics);
    top.finish();

    config.cluster_cidrs = cidrs;
    config.cluster_cidrs.sort();
    config
}

fn read_mode(top: &mut Fields<'_, '_>) -> Option<Mode> {
    top.choice("mode", &Mode::ALL.map(|mode| (mode.as_str(), mode)))
}

/// The cluster CIDRs that are valid, in the order given.
fn read_cluster_cidrs(top: &mut Fields<'_, '_>) -> Vec<Prefix> {
    let key = "clusterCIDRs";
    let mut seen: Vec<Prefix> = Vec::new();
    let given = top.list(key, "a list of CIDRs", CIDR_EXAMPLE, |item| {
        let cidr = read_cidr(item)?;
        if seen.contains(&cidr) {
            return Err(Complaint::conflict("the CIDR is given twice", "keep one of the two"));
        }
        if let Some(other) = seen.iter().find(|other| other.overlaps(&cidr)) {
            let reason = format!("the CIDR overlaps {other}, given before it");
            return Err(Complaint::conflict(reason, "keep the larger one"));
        }
        if let Some(other) = seen.iter().find(|other| other.family() == cidr.family()) {
            let reason = format!("there is another {} CIDR, {other}, and only one per family can be", cidr.family());
            return Err(Complaint::conflict(reason, "use one CIDR that is large enough"));
        }
        seen.push(cidr);
        Ok(cidr)
    });
    let empty = matches!(top.value(key), Some(Value::List(items)) if items.is_empty());
    if empty || top.value(key).is_none() {
        let remedy = format!("say which addresses pods get, for example {CIDR_EXAMPLE}");
        top.missing(key, "at least one cluster CIDR is needed", &remedy);
    }
    given.unwrap_or_default()
}

/// A prefix of any addresses.
fn read_prefix(item: &Value, example: &str) -> Result<Prefix, Complaint> {
    let Value::Text(text) = item else {
        return Err(Complaint::wrong_type(item, "a CIDR", format!("write for example {example}")));
    };
    text.parse().map_err(|error: PrefixError| {
        let remedy = match &error {
            PrefixError::Syntax(_) => "write address/length, for example 10.42.0.0/16".to_owned(),
            PrefixError::HostBits { canonical, .. } => format!("write {canonical}"),
        };
        Complaint::bad(error.to_string(), remedy)
    })
}

fn read_cidr(item: &Value) -> Result<Prefix, Complaint> {
    let cidr = read_prefix(item, CIDR_EXAMPLE)?;
    match reserved(&cidr) {
        None => Ok(cidr),
        Some((range, what)) => Err(Complaint::bad(
            format!("the CIDR contains {what} addresses ({range}), which pods cannot have"),
            "use a private range, for example one within 10.0.0.0/8 or fd00::/8",
        )),
    }
}

/// The first range of the IANA special-purpose registries (RFC 6890) that is no unicast range and shares an address with
/// the prefix.
fn reserved(prefix: &Prefix) -> Option<(Prefix, &'static str)> {
    let v4 = |a, b, length| (IpAddr::V4(Ipv4Addr::new(a, b, 0, 0)), length);
    let v6 = |a, f, h, length| (IpAddr::V6(Ipv6Addr::new(a, 0, 0, 0, 0, f, 0, h)), length);
    let ranges = [
        (v4(0, 0, 8), "unspecified"),
        (v4(127, 0, 8), "loopback"),
        (v4(169, 254, 16), "link-local"),
        (v4(224, 0, 4), "multicast"),
        ((IpAddr::V4(Ipv4Addr::BROADCAST), 32), "broadcast"),
        (v6(0, 0, 0, 128), "unspecified"),
        (v6(0, 0, 1, 128), "loopback"),
        (v6(0, 0xffff, 0, 96), "IPv4-mapped"),
        (v6(0xfe80, 0, 0, 10), "link-local"),
        (v6(0xff00, 0, 0, 8), "multicast"),
    ];
    ranges
        .into_iter()
        .filter_map(|((address, length), what)| Some((Prefix::containing(address, length).ok()?, what)))
        .find(|(range, _)| range.overlaps(prefix))
}

fn read_block_lengths(top: &mut Fields<'_, '_>, cidrs: &[Prefix]) -> BlockLengths {
    let mut section = top.section("blockLengths");
    let mut read = |key: &'static str, family: Family, default: u8| {
        let longest = family.bits() - 2;
        let why = format!("a block of {family} addresses has at least four, so that its length is at most {longest}");
        let length = section.number(key, 1..=longest, &why);
        let given = section.value(key).is_some();
        let cidr = cidrs.iter().find(|cidr| cidr.family() == family);
        // A length that is not valid by itself was reported already.
        let used = if given { length } else { Some(default) };
        if let (Some(used), Some(cidr)) = (used, cidr)
            && used <= cidr.length()
        {
            let remedy = if cidr.length() < longest {
                format!("use a length from {} to {longest}, or a larger cluster CIDR", cidr.length() + 1)
            } else {
                "use a larger cluster CIDR".to_owned()
            };
            let default = if given { "" } else { "the default " };
            let reason =
                format!("{default}block length {used} leaves no room for blocks within the cluster CIDR {cidr}");
            section.complain(key, Complaint::conflict(reason, remedy));
        }
        length.unwrap_or(default)
    };
    let default = BlockLengths::default();
    let lengths =
        BlockLengths { ipv4: read("ipv4", Family::Ipv4, default.ipv4), ipv6: read("ipv6", Family::Ipv6, default.ipv6) };
    section.finish();
    lengths
}

fn read_underlay(top: &mut Fields<'_, '_>, cidrs: &[Prefix]) -> UnderlayConfig {
    let mut section = top.section("underlay");
    let default = UnderlayConfig::default();
    let family = section.choice("family", &[("ipv4", Family::Ipv4), ("ipv6", Family::Ipv6)]).unwrap_or(default.family);

    let interface = section.parsed::<InterfaceName>("interface", "an interface name", "'ip link' lists the names");
    if let Some(name) = &interface {
        let reason = if name.as_str() == "lo" {
            Some("the loopback interface reaches no other node")
        } else if marks::is_tunnel_interface(name.as_str()) || marks::is_pod_interface(name.as_str()) {
            Some("this interface is Husk's own, and tunnels cannot run over themselves")
        } else {
            None
        };
        if let Some(reason) = reason {
            section.complain("interface", Complaint::bad(reason, "name the interface that reaches the other nodes"));
        }
    }

    let mut addresses = section.section("addresses");
    let found = DualStack {
        ipv4: read_address("ipv4", &mut addresses, cidrs),
        ipv6: read_address("ipv6", &mut addresses, cidrs),
    };
    addresses.finish();

    let (smallest, why) = match family {
        Family::Ipv4 => (mtu::MINIMUM_IPV4, "every IPv4 link carries at least 576 bytes here (RFC 791), at most 65535"),
        Family::Ipv6 => (mtu::MINIMUM_IPV6, "every IPv6 link carries at least 1280 bytes (RFC 8200), at most 65535"),
    };
    let mtu = section.number("mtu", smallest..=mtu::MAXIMUM, why);
    section.finish();
    UnderlayConfig { family, interface, addresses: found, mtu }
}

/// An address of the family that the key is named after.
fn read_address<T>(key: &'static str, section: &mut Fields<'_, '_>, cidrs: &[Prefix]) -> Option<T>
where
    T: FromStr + Into<IpAddr> + Copy,
{
    let text = section.text(key, "an address")?;
    let Ok(own) = text.parse::<T>() else {
        let complaint = match text.parse::<IpAddr>() {
            Ok(other) => {
                let family = Family::of(other);
                let right = family.to_string().to_lowercase();
                Complaint::bad(format!("this is an {family} address"), format!("write it behind the key {right}"))
            }
            Err(_) => Complaint::bad("this is no address", "write one address without a prefix length"),
        };
        section.complain(key, complaint);
        return None;
    };
    let address = Prefix::host(own.into());
    if let Some((range, what)) = reserved(&address) {
        let reason = format!("{what} addresses ({range}) do not name a node to other nodes");
        section.complain(key, Complaint::bad(reason, "use an address that other nodes can reach"));
    } else if let Some(cidr) = cidrs.iter().find(|cidr| cidr.overlaps(&address)) {
        let reason = format!("the address lies within the cluster CIDR {cidr}, whose packets go into the tunnels");
        section.complain(key, Complaint::conflict(reason, "use a cluster CIDR that no node has an address of"));
    }
    Some(own)
}

fn read_cni(top: &mut Fields<'_, '_>) -> CniConfig {
    let mut section = top.section("cni");
    let default = CniConfig::default();
    let bin_directory = read_path(&mut section, "binDirectory").unwrap_or(default.bin_directory);
    let config_directory = read_path(&mut section, "configDirectory").unwrap_or(default.config_directory);
    let remedy = "use letters and digits, for example husk";
    let network = section.parsed("network", "a network name", remedy).unwrap_or(default.network);
    section.finish();
    CniConfig { bin_directory, config_directory, network }
}

fn read_log(top: &mut Fields<'_, '_>) -> LogConfig {
    let mut section = top.section("log");
    let format = section.choice("format", &[("text", LogFormat::Text), ("json", LogFormat::Json)]).unwrap_or_default();
    let levels = [
        ("error", LogLevel::Error),
        ("warn", LogLevel::Warn),
        ("info", LogLevel::Info),
        ("debug", LogLevel::Debug),
        ("trace", LogLevel::Trace),
    ];
    let level = section.choice("level", &levels).unwrap_or_default();
    section.finish();
    LogConfig { format, level }
}

/// An absolute path.
fn read_path(section: &mut Fields<'_, '_>, key: &'static str) -> Option<PathBuf> {
    let text = section.text(key, "a path")?;
    let complaint = if !text.starts_with('/') {
        Complaint::bad("the path is relative, and a daemon has no directory of its own", "write a path from / on")
    } else if text.contains(char::is_control) {
        Complaint::bad("the path has control characters", "write a path of printable characters")
    } else {
        return Some(PathBuf::from(text));
    };
    section.complain(key, complaint);
    None
}
