//! The environment a runtime calls with (CNI specification 1.1, section 2), read once into types.

use std::collections::BTreeMap;
use std::ffi::OsString;

use husk_overlay::name::{ContainerId, InterfaceName};

use crate::error::{Code, Failure};

/// Variable that says what to do; without it the program is a command-line tool.
pub(crate) const COMMAND: &str = "CNI_COMMAND";

/// What the runtime wants.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Invocation {
    /// Connect a pod.
    Add(Attach),
    /// Disconnect a pod, which may be gone.
    Del(Container),
    /// Is a pod connected as it was?
    Check(Attach),
    /// Can ADD work?
    Status,
    /// Remove whatever is not in the list of valid attachments.
    Gc,
    /// Which versions of the specification are known?
    Version,
}

/// What names an attachment within its network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Container {
    /// `CNI_CONTAINERID`
    pub(crate) id: ContainerId,
    /// `CNI_IFNAME`
    pub(crate) ifname: InterfaceName,
}

/// An attachment with its namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Attach {
    /// Which one.
    pub(crate) container: Container,
    /// `CNI_NETNS`
    pub(crate) netns: String,
    /// `CNI_ARGS`
    pub(crate) args: Arguments,
}

/// What of `CNI_ARGS` matters to us.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Arguments {
    /// `K8S_POD_NAMESPACE`
    pub(crate) pod_namespace: Option<String>,
    /// `K8S_POD_NAME`
    pub(crate) pod_name: Option<String>,
    /// `K8S_POD_UID`
    pub(crate) pod_uid: Option<String>,
    /// `IP`, as given.
    pub(crate) ip: Option<String>,
    /// `MAC`, as given.
    pub(crate) mac: Option<String>,
}

impl Invocation {
    /// Reads the environment. All variables that are wrong are named at once.
    pub(crate) fn read(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Result<Self, Failure> {
        let mut reader = Reader {
            variables: variables
                .into_iter()
                .filter_map(|(name, value)| Some((name.into_string().ok()?, value)))
                .filter(|(name, _)| name.starts_with("CNI_"))
                .collect(),
            problems: Vec::new(),
        };
        let command = reader.required(COMMAND).unwrap_or_default();
        let invocation = match command.as_str() {
            "ADD" => reader.attach().map(Self::Add),
            "DEL" => reader.container().map(Self::Del),
            "CHECK" => reader.attach().map(Self::Check),
            "STATUS" => Some(Self::Status),
            "GC" => Some(Self::Gc),
            "VERSION" => Some(Self::Version),
            other => {
                reader.problems.push(format!("{COMMAND} {other:?} is none of ADD, DEL, CHECK, STATUS, GC, VERSION"));
                None
            }
        };
        invocation.filter(|_| reader.problems.is_empty()).ok_or_else(|| {
            let message = format!("the runtime's environment is not valid: {}", reader.problems.join("; "));
            Failure::new(Code::InvalidEnvironment, message)
        })
    }
}

struct Reader {
    variables: BTreeMap<String, OsString>,
    problems: Vec<String>,
}

impl Reader {
    /// A variable; an empty one counts as missing.
    fn optional(&mut self, name: &str) -> Option<String> {
        let value = self.variables.get(name).filter(|value| !value.is_empty())?;
        let text = value.to_str().map(str::to_owned);
        if text.is_none() {
            self.problems.push(format!("{name} is not valid UTF-8"));
        }
        text
    }

    fn required(&mut self, name: &str) -> Option<String> {
        if self.variables.get(name).is_none_or(|value| value.is_empty()) {
            self.problems.push(format!("{name} is missing"));
        }
        self.optional(name)
    }

    fn parsed<T, E: std::fmt::Display>(&mut self, name: &str, parse: impl Fn(&str) -> Result<T, E>) -> Option<T> {
        let text = self.required(name)?;
        parse(&text).map_err(|error| self.problems.push(format!("{name}: {error}"))).ok()
    }

    fn container(&mut self) -> Option<Container> {
        let id = self.parsed("CNI_CONTAINERID", ContainerId::new);
        let ifname = self.parsed("CNI_IFNAME", InterfaceName::new);
        Some(Container { id: id?, ifname: ifname? })
    }

    fn attach(&mut self) -> Option<Attach> {
        let container = self.container();
        let netns = self.required("CNI_NETNS");
        let args = self.optional("CNI_ARGS").unwrap_or_default();
        let args = parse_arguments(&args).map_err(|problem| self.problems.push(format!("CNI_ARGS: {problem}"))).ok();
        Some(Attach { container: container?, netns: netns?, args: args? })
    }
}

/// Parses `KEY=VALUE;KEY=VALUE`. Unknown keys are none of our business; runtimes add some as they like.
fn parse_arguments(text: &str) -> Result<Arguments, String> {
    let mut arguments = Arguments::default();
    for pair in text.split(';').filter(|pair| !pair.is_empty()) {
        let (key, value) =
            pair.split_once('=').ok_or_else(|| format!("{pair:?} is not of the form KEY=VALUE;KEY=VALUE"))?;
        let place = match key {
            "K8S_POD_NAMESPACE" => &mut arguments.pod_namespace,
            "K8S_POD_NAME" => &mut arguments.pod_name,
            "K8S_POD_UID" => &mut arguments.pod_uid,
            "IP" => &mut arguments.ip,
            "MAC" => &mut arguments.mac,
            _ => continue,
        };
        if value.chars().any(char::is_control) || value.len() > 253 {
            return Err(format!("{key} is longer than 253 bytes or has control characters in it"));
        }
        *place = Some(value.to_owned()).filter(|value| !value.is_empty());
    }
    Ok(arguments)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn read(variables: &[(&str, &str)]) -> Result<Invocation, Failure> {
        Invocation::read(variables.iter().map(|(name, value)| ((*name).into(), (*value).into())))
    }

    #[test]
    fn an_add_is_read() {
        let got = read(&[
            ("CNI_COMMAND", "ADD"),
            ("CNI_CONTAINERID", "abc"),
            ("CNI_NETNS", "/run/netns/x"),
            ("CNI_IFNAME", "eth0"),
            (
                "CNI_ARGS",
                "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=web-0;K8S_POD_UID=8c2e-1;IP=10.42.0.9",
            ),
        ]);
        let Ok(Invocation::Add(attach)) = got else { panic!("{got:?}") };
        assert_eq!((attach.container.id.as_str(), attach.container.ifname.as_str()), ("abc", "eth0"));
        assert_eq!(attach.netns, "/run/netns/x");
        assert_eq!(attach.args.pod_namespace.as_deref(), Some("default"));
        assert_eq!(attach.args.pod_name.as_deref(), Some("web-0"));
        assert_eq!(attach.args.pod_uid.as_deref(), Some("8c2e-1"));
        assert_eq!(attach.args.ip.as_deref(), Some("10.42.0.9"));
    }

    #[test]
    fn a_del_needs_no_namespace_and_does_not_look_at_arguments() {
        let got = read(&[
            ("CNI_COMMAND", "DEL"),
            ("CNI_CONTAINERID", "abc"),
            ("CNI_NETNS", ""),
            ("CNI_IFNAME", "eth0"),
            ("CNI_ARGS", "garbage"),
        ]);
        assert!(matches!(got, Ok(Invocation::Del(_))), "{got:?}");
    }

    #[test]
    fn every_bad_variable_is_named() {
        let failure =
            read(&[("CNI_COMMAND", "ADD"), ("CNI_CONTAINERID", "_x"), ("CNI_IFNAME", "a/b"), ("CNI_ARGS", "x")])
                .unwrap_err();
        assert_eq!(failure.code, Code::InvalidEnvironment);
        for name in ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"] {
            assert!(failure.message.contains(name), "{name}: {failure}");
        }
        let pattern = read(&[("CNI_COMMAND", "DEL"), ("CNI_CONTAINERID", "x"), ("CNI_IFNAME", "eth%d")]).unwrap_err();
        assert!(pattern.message.contains("CNI_IFNAME: interface name \"eth%d\""), "{pattern}");
        assert!(read(&[("CNI_COMMAND", "FROBNICATE")]).unwrap_err().message.contains("FROBNICATE"));
        assert!(read(&[("CNI_COMMAND", "")]).unwrap_err().message.contains("CNI_COMMAND"));
    }

    proptest! {
        #[test]
        fn no_environment_panics(values in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..40), 4)) {
            use std::os::unix::ffi::OsStringExt as _;
            let names = ["CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS"];
            for command in ["ADD", "DEL", "CHECK"] {
                let given = names.iter().zip(&values).map(|(name, value)| ((*name).into(), OsString::from_vec(value.clone())));
                match Invocation::read(given.chain([("CNI_COMMAND".into(), command.into())])) {
                    Ok(_) => {}
                    Err(failure) => prop_assert!(failure.message.contains("CNI_"), "{}", failure),
                }
            }
        }

        #[test]
        fn arguments_are_understood_or_refused(text in any::<String>()) {
            if let Err(problem) = parse_arguments(&text) {
                prop_assert!(!problem.is_empty());
            }
        }
    }
}
