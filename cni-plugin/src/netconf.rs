//! The network configuration on standard input (CNI specification 1.1, section 1).

mod bandwidth;
pub(crate) mod port_mappings;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::path::{Path, PathBuf};

use husk_overlay::endpoint::AttachmentId;
use husk_overlay::mac::MacAddress;
use husk_overlay::marks::RUN_DIRECTORY;
use husk_overlay::name::{ContainerId, InterfaceName, NetworkName};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::error::{Code, Failure};
use crate::version::Version;

/// Keys a configuration for ADD may have, beside the reserved `cni.dev/…`.
const KNOWN_KEYS: [&str; 9] =
    ["cniVersion", "name", "type", "capabilities", "args", "runtimeConfig", "dns", "prevResult", "runDirectory"];

/// Keys of `runtimeConfig` that are understood (CNI conventions, "Dynamic Plugin specific fields").
const KNOWN_RUNTIME_KEYS: [&str; 5] = ["bandwidth", "portMappings", "ips", "mac", "dns"];

/// Key of the list of attachments that garbage collection must keep.
const VALID_ATTACHMENTS: &str = "cni.dev/valid-attachments";

/// What libcni 1.2.0 to 1.2.2 called it, by a mistake in the specification; later ones write both keys.
const ATTACHMENTS: &str = "cni.dev/attachments";

/// The configuration, as far as every command needs it; the rest is looked at by those who want it, so that a DEL never
/// fails over something it does not need.
#[derive(Debug, Clone)]
pub(crate) struct NetConf {
    /// `cniVersion`
    pub(crate) version: Version,
    /// `name`
    pub(crate) network: NetworkName,
    /// `runDirectory`: where the daemon's files and the leases are.
    pub(crate) run_directory: PathBuf,
    fields: Map<String, Value>,
}

/// Name service settings of a result (CNI specification 1.1, section 5).
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default)]
pub(crate) struct Dns {
    /// Servers in order of priority.
    pub(crate) nameservers: Vec<String>,
    /// Local domain.
    pub(crate) domain: String,
    /// Search domains in order of priority.
    pub(crate) search: Vec<String>,
    /// Options for the resolver.
    pub(crate) options: Vec<String>,
}

/// `runtimeConfig.dns`, which names its parts differently.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct RuntimeDns {
    servers: Vec<String>,
    searches: Vec<String>,
    options: Vec<String>,
}

impl NetConf {
    /// Reads a configuration.
    pub(crate) fn parse(text: &[u8]) -> Result<Self, Failure> {
        let value: Value = serde_json::from_slice(text).map_err(|error| {
            Failure::new(Code::Decode, format!("the network configuration on standard input is not JSON: {error}"))
        })?;
        let Value::Object(fields) = value else {
            return Err(Failure::new(Code::Decode, "the network configuration on standard input is not a JSON object"));
        };
        let version = match text_of(&fields, "cniVersion")? {
            Some(text) => Version::parse(text)?,
            None => Version::parse("")?,
        };
        let name = text_of(&fields, "name")?.unwrap_or_default();
        let network = NetworkName::new(name).map_err(|error| invalid("name", &error.to_string()))?;
        let run_directory = PathBuf::from(text_of(&fields, "runDirectory")?.unwrap_or(RUN_DIRECTORY));
        if !run_directory.is_absolute() {
            return Err(invalid("runDirectory", "it must be an absolute path"));
        }
        Ok(Self { version, network, run_directory, fields })
    }

    /// Refuses what is not understood. Something meant to have an effect must not be ignored in silence.
    pub(crate) fn refuse_unknown_fields(&self) -> Result<(), Failure> {
        for (key, value) in &self.fields {
            if !KNOWN_KEYS.contains(&key.as_str()) && !key.starts_with("cni.dev/") {
                return Err(unsupported(key, value));
            }
        }
        for (key, value) in self.object("runtimeConfig")?.into_iter().flatten() {
            if !KNOWN_RUNTIME_KEYS.contains(&key.as_str()) {
                return Err(unsupported(&format!("runtimeConfig.{key}"), value));
            }
        }
        Ok(())
    }

    /// Addresses that are asked for: `runtimeConfig.ips`, else `args.cni.ips`, else `IP` of `CNI_ARGS`.
    pub(crate) fn requested_addresses(&self, argument: Option<&str>) -> Result<Vec<IpAddr>, Failure> {
        let (runtime, args) = self.requested("ips")?;
        let (key, list) = match (runtime, args, argument) {
            (Some(list), _, _) => ("runtimeConfig.ips", texts("runtimeConfig.ips", list)?),
            (None, Some(list), _) => ("args.cni.ips", texts("args.cni.ips", list)?),
            (None, None, Some(text)) => ("IP of CNI_ARGS", text.split(',').collect()),
            (None, None, None) => return Ok(Vec::new()),
        };
        list.into_iter().map(|text| address(key, text)).collect()
    }

    /// Ethernet address that is asked for: `runtimeConfig.mac`, else `args.cni.mac`, else `MAC` of `CNI_ARGS`.
    pub(crate) fn requested_mac(&self, argument: Option<&str>) -> Result<Option<MacAddress>, Failure> {
        let (runtime, args) = self.requested("mac")?;
        let (key, text) = match (runtime, args, argument) {
            (Some(value), _, _) => ("runtimeConfig.mac", text("runtimeConfig.mac", value)?),
            (None, Some(value), _) => ("args.cni.mac", text("args.cni.mac", value)?),
            (None, None, Some(text)) => ("MAC of CNI_ARGS", text),
            (None, None, None) => return Ok(None),
        };
        let mac: MacAddress = text.parse().map_err(|error| invalid(key, &format!("{error}")))?;
        if mac.is_unicast() { Ok(Some(mac)) } else { Err(invalid(key, "an interface needs a unicast address")) }
    }

    /// Name service settings: `dns`, each part overridden by `runtimeConfig.dns` if that has it.
    pub(crate) fn dns(&self) -> Result<Dns, Failure> {
        let mut dns: Dns = self.decode("dns", self.fields.get("dns"))?;
        let runtime = self.object("runtimeConfig")?.and_then(|it| it.get("dns"));
        let runtime = runtime.map(|it| match it.as_object() {
            Some(fields) => conventional(fields, &["servers", "searches", "options"]).into(),
            None => it.clone(),
        });
        let RuntimeDns { servers, searches, options } = self.decode("runtimeConfig.dns", runtime.as_ref())?;
        for (part, wins) in [(&mut dns.nameservers, servers), (&mut dns.search, searches), (&mut dns.options, options)]
        {
            if !wins.is_empty() {
                *part = wins;
            }
        }
        Ok(dns)
    }

    /// Result of the plugins before us.
    pub(crate) fn previous_result(&self) -> Result<Option<&Map<String, Value>>, Failure> {
        self.object("prevResult")
    }

    /// Attachments that garbage collection must keep. A missing list is an error: it does not mean "none", as `null` does.
    /// libcni, being written in Go, says so when it has been given none, and has then deleted all it knew of by itself.
    pub(crate) fn valid_attachments(&self) -> Result<BTreeSet<AttachmentId>, Failure> {
        #[derive(Deserialize)]
        struct Attachment {
            #[serde(rename = "containerID")]
            container_id: ContainerId,
            ifname: InterfaceName,
        }
        let list = self.fields.get(VALID_ATTACHMENTS).or_else(|| self.fields.get(ATTACHMENTS)).ok_or_else(|| {
            invalid(VALID_ATTACHMENTS, "it is missing, and without it everything would have to be removed")
        })?;
        let list: Option<Vec<Attachment>> = Deserialize::deserialize(list)
            .map_err(|error: serde_json::Error| invalid(VALID_ATTACHMENTS, &error.to_string()))?;
        Ok(list
            .unwrap_or_default()
            .into_iter()
            .map(|it| AttachmentId { network: self.network.clone(), container_id: it.container_id, ifname: it.ifname })
            .collect())
    }

    /// A file below the run directory.
    pub(crate) fn run_file(&self, name: &str) -> PathBuf {
        Path::new(&self.run_directory).join(name)
    }

    /// What `runtimeConfig` and `args.cni` have under a key. A `null` is what runtimes written in Go send for what nobody set.
    fn requested(&self, key: &str) -> Result<(Option<&Value>, Option<&Value>), Failure> {
        let runtime = self.object("runtimeConfig")?.and_then(|it| it.get(key));
        let args = self.object("args")?.and_then(|it| it.get("cni")).and_then(|it| it.get(key));
        Ok((runtime.filter(|it| !it.is_null()), args.filter(|it| !it.is_null())))
    }

    fn object(&self, key: &str) -> Result<Option<&Map<String, Value>>, Failure> {
        match self.fields.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::Object(object)) => Ok(Some(object)),
            Some(other) => Err(invalid(key, &format!("{other} is not an object"))),
        }
    }

    fn decode<T: Default + for<'de> Deserialize<'de>>(&self, key: &str, value: Option<&Value>) -> Result<T, Failure> {
        match value {
            None | Some(Value::Null) => Ok(T::default()),
            // Else serde would take a list for a structure whose fields come in order.
            Some(value) if !value.is_object() => Err(invalid(key, &format!("{value} is not an object"))),
            Some(value) => T::deserialize(value).map_err(|error| invalid(key, &error.to_string())),
        }
    }
}

fn invalid(key: &str, problem: &str) -> Failure {
    Failure::new(Code::InvalidConfig, format!("the network configuration's {key} is not valid: {problem}"))
}

fn unsupported(key: &str, value: &Value) -> Failure {
    let message =
        format!("the network configuration has the field {key} = {value}, which husk does not support; remove it");
    Failure::new(Code::UnsupportedField, message)
}

fn text_of<'a>(fields: &'a Map<String, Value>, key: &str) -> Result<Option<&'a str>, Failure> {
    match fields.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(invalid(key, &format!("{other} is not a text"))),
    }
}

/// An object of `runtimeConfig` with its known keys as the conventions write them. Go's decoder, which the reference plugins
/// use, takes them in any case, and containerd relies on it: it sends `HostPort` and `IngressRate`. A `null` is what nobody set.
fn conventional(fields: &Map<String, Value>, known: &[&str]) -> Map<String, Value> {
    let name = |key: &String| {
        let meant = known.iter().find(|name| name.eq_ignore_ascii_case(key));
        // Of two spellings of one key the other one means nothing, and is refused as such.
        meant.filter(|name| !fields.contains_key(**name)).map_or_else(|| key.clone(), |name| (*name).to_owned())
    };
    fields.iter().filter(|(_, value)| !value.is_null()).map(|(key, value)| (name(key), value.clone())).collect()
}

fn text<'a>(key: &str, value: &'a Value) -> Result<&'a str, Failure> {
    value.as_str().ok_or_else(|| invalid(key, &format!("{value} is not a text")))
}

fn texts<'a>(key: &str, list: &'a Value) -> Result<Vec<&'a str>, Failure> {
    let list = list.as_array().ok_or_else(|| invalid(key, &format!("{list} is not a list")))?;
    list.iter().map(|it| text(key, it)).collect()
}

/// An address, also with a prefix length behind it, as the convention allows; the length means nothing to us.
fn address(key: &str, text: &str) -> Result<IpAddr, Failure> {
    let bare = text.split_once('/').map_or(text, |(address, _)| address);
    bare.parse().map_err(|_| invalid(key, &format!("{text:?} is not an address such as 10.42.0.9 or fd42::9")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    fn parse(value: &Value) -> Result<NetConf, Failure> {
        NetConf::parse(value.to_string().as_bytes())
    }

    fn with(extra: Value) -> NetConf {
        let mut value = json!({"cniVersion": "1.0.0", "name": "husk", "type": "husk"});
        let (Value::Object(fields), Value::Object(extra)) = (&mut value, extra) else { panic!("objects") };
        fields.extend(extra);
        parse(&value).unwrap()
    }

    #[test]
    fn failures_have_their_codes() {
        let code = |value: &Value| parse(value).unwrap_err().code;
        assert_eq!(NetConf::parse(b"{").unwrap_err().code, Code::Decode);
        assert_eq!(code(&json!([])), Code::Decode);
        assert_eq!(code(&json!({"name": "husk"})), Code::IncompatibleVersion);
        assert_eq!(code(&json!({"name": "husk", "cniVersion": "0.2.0"})), Code::IncompatibleVersion);
        assert_eq!(code(&json!({"name": "husk", "cniVersion": 1})), Code::InvalidConfig);
        assert_eq!(code(&json!({"name": "a/b", "cniVersion": "1.0.0"})), Code::InvalidConfig);
        assert_eq!(code(&json!({"cniVersion": "1.0.0"})), Code::InvalidConfig);
        assert_eq!(code(&json!({"name": "h", "cniVersion": "1.0.0", "runDirectory": "x"})), Code::InvalidConfig);
    }

    #[test]
    fn unknown_fields_are_named_with_key_and_value() {
        let failure = with(json!({"mtu": 1400})).refuse_unknown_fields().unwrap_err();
        assert_eq!(failure.code, Code::UnsupportedField);
        assert!(failure.message.contains("mtu = 1400"), "{failure}");
        let failure = with(json!({"runtimeConfig": {"infinibandGUID": {}}})).refuse_unknown_fields().unwrap_err();
        assert!(failure.message.contains("runtimeConfig.infinibandGUID = {}"), "{failure}");
        assert!(with(json!({"cni.dev/future": 1, "runtimeConfig": {"ips": []}})).refuse_unknown_fields().is_ok());
    }

    #[test]
    fn requested_addresses_have_an_order_of_precedence() {
        let args = json!({"args": {"cni": {"ips": ["10.42.0.7/24"]}}});
        let both =
            json!({"args": {"cni": {"ips": ["10.42.0.7"]}}, "runtimeConfig": {"ips": ["10.42.0.8", "fd42::8/64"]}});
        let texts = |conf: NetConf, argument| -> Vec<String> {
            conf.requested_addresses(argument).unwrap().iter().map(IpAddr::to_string).collect()
        };
        assert_eq!(texts(with(both), Some("10.42.0.6")), ["10.42.0.8", "fd42::8"]);
        assert_eq!(texts(with(args), Some("10.42.0.6")), ["10.42.0.7"]);
        assert_eq!(texts(with(json!({})), Some("10.42.0.6")), ["10.42.0.6"]);
        assert_eq!(texts(with(json!({"runtimeConfig": {"ips": null}})), Some("10.42.0.6")), ["10.42.0.6"]);
        for bad in [json!({"runtimeConfig": {"ips": ["x"]}}), json!({"runtimeConfig": {"ips": "10.0.0.1"}})] {
            assert_eq!(with(bad).requested_addresses(None).unwrap_err().code, Code::InvalidConfig);
        }
    }

    #[test]
    fn a_requested_mac_is_a_unicast_address() {
        let mac = |text: &str| with(json!({"runtimeConfig": {"mac": text}})).requested_mac(None);
        assert_eq!(mac("02:00:5e:10:00:01").unwrap().unwrap().to_string(), "02:00:5e:10:00:01");
        assert_eq!(mac("01:00:5e:00:00:01").unwrap_err().code, Code::InvalidConfig);
        assert_eq!(mac("nonsense").unwrap_err().code, Code::InvalidConfig);
        assert_eq!(with(json!({})).requested_mac(Some("02:00:5e:10:00:02")).unwrap().unwrap().0[5], 2);
        let args = with(json!({"args": {"cni": {"mac": "02:00:5e:10:00:03"}}}));
        assert_eq!(args.requested_mac(Some("02:00:5e:10:00:02")).unwrap().unwrap().0[5], 3);
        let bad = with(json!({"args": {"cni": {"mac": 7}}})).requested_mac(None).unwrap_err();
        assert!(bad.message.contains("args.cni.mac"), "{bad}");
    }

    #[test]
    fn dns_parts_are_overridden_one_by_one() {
        let dns = with(json!({
            "dns": {"nameservers": ["10.0.0.1"], "domain": "cluster.local", "search": ["a"]},
            "runtimeConfig": {"dns": {"servers": ["10.0.0.2"]}},
        }))
        .dns()
        .unwrap();
        assert_eq!((dns.nameservers, dns.search), (vec!["10.0.0.2".to_owned()], vec!["a".to_owned()]));
        assert_eq!(with(json!({"dns": []})).dns().unwrap_err().code, Code::InvalidConfig);
        assert_eq!(with(json!({"runtimeConfig": {"dns": 7}})).dns().unwrap_err().code, Code::InvalidConfig);
        let of_containerd = with(json!({"runtimeConfig": {"dns": {"Servers": ["10.0.0.3"], "Searches": null}}}));
        assert_eq!(of_containerd.dns().unwrap().nameservers, ["10.0.0.3"]);
    }

    #[test]
    fn a_missing_list_of_valid_attachments_is_not_an_empty_one() {
        assert_eq!(with(json!({})).valid_attachments().unwrap_err().code, Code::InvalidConfig);
        assert!(with(json!({VALID_ATTACHMENTS: []})).valid_attachments().unwrap().is_empty());
        assert!(with(json!({VALID_ATTACHMENTS: null, ATTACHMENTS: null})).valid_attachments().unwrap().is_empty());
        let one = with(json!({VALID_ATTACHMENTS: [{"containerID": "abc", "ifname": "eth0"}]}));
        assert_eq!(one.valid_attachments().unwrap().first().unwrap().to_string(), "husk/abc/eth0");
        let bad = with(json!({VALID_ATTACHMENTS: [{"containerID": "/", "ifname": "eth0"}]}));
        assert_eq!(bad.valid_attachments().unwrap_err().code, Code::InvalidConfig);
    }

    fn json_value() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i64>().prop_map(Value::from),
            ".{0,12}".prop_map(Value::from),
            Just(json!("1.0.0")),
            Just(json!("husk")),
            Just(json!("10.42.0.1")),
        ];
        let key = prop_oneof![
            proptest::sample::select(KNOWN_KEYS.to_vec()).prop_map(str::to_owned),
            proptest::sample::select(vec!["ips", "mac", "dns", "cni", "servers", VALID_ATTACHMENTS])
                .prop_map(str::to_owned),
            ".{0,6}",
        ];
        leaf.prop_recursive(3, 24, 4, move |inner| {
            prop_oneof![
                proptest::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                proptest::collection::btree_map(key.clone(), inner, 0..6)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    proptest! {
        #[test]
        fn no_bytes_panic(text in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = NetConf::parse(&text);
        }

        #[test]
        fn no_value_panics(fields in proptest::collection::btree_map(
            proptest::sample::select(KNOWN_KEYS.to_vec()).prop_map(str::to_owned), json_value(), 0..9,
        )) {
            let mut fields: Map<String, Value> = fields.into_iter().collect();
            let _ = parse(&Value::Object(fields.clone()));
            for key in ["runDirectory", "name", "cniVersion"] {
                fields.remove(key);
            }
            let conf = with(Value::Object(fields));
            let _ = (conf.refuse_unknown_fields(), conf.requested_addresses(None), conf.requested_mac(None));
            let _ = (conf.dns(), conf.previous_result().map(|_| ()), conf.valid_attachments());
        }
    }
}
