//! `runtimeConfig.bandwidth`: rates in bits per second, bursts in bits (CNI conventions, "Dynamic Plugin specific fields").

use husk_overlay::bandwidth::{Bandwidth, Limit};
use serde_json::{Map, Value};

use super::{NetConf, conventional, invalid, unsupported};
use crate::error::Failure;

/// Key of the whole.
const KEY: &str = "runtimeConfig.bandwidth";

/// Its keys, in two directions.
const INGRESS: [&str; 2] = ["ingressRate", "ingressBurst"];
const EGRESS: [&str; 2] = ["egressRate", "egressBurst"];

impl NetConf {
    /// Limits that are asked for; none if there are none. A rate of 0 is no limit, and a burst of 0 none that was asked for:
    /// runtimes written in Go send zeros for what nobody set.
    pub(crate) fn bandwidth(&self) -> Result<Option<Bandwidth>, Failure> {
        let fields = match self.object("runtimeConfig")?.and_then(|it| it.get("bandwidth")) {
            None | Some(Value::Null) => return Ok(None),
            Some(Value::Object(fields)) => conventional(fields, &[INGRESS, EGRESS].concat()),
            Some(other) => return Err(invalid(KEY, &format!("{other} is not an object"))),
        };
        let known = |key: &str| INGRESS.contains(&key) || EGRESS.contains(&key);
        if let Some((key, value)) = fields.iter().find(|(key, _)| !known(key)) {
            return Err(unsupported(&format!("{KEY}.{key}"), value));
        }
        let bandwidth = Bandwidth { ingress: limit(&fields, INGRESS)?, egress: limit(&fields, EGRESS)? };
        Ok(Some(bandwidth).filter(|it| *it != Bandwidth::default()))
    }
}

fn limit(fields: &Map<String, Value>, [rate_key, burst_key]: [&str; 2]) -> Result<Option<Limit>, Failure> {
    match (number(fields, rate_key)?, number(fields, burst_key)?) {
        (0, 0) => Ok(None),
        (0, burst) => Err(invalid(
            &format!("{KEY}.{burst_key}"),
            &format!("{burst} is a burst without a rate, which limits nothing; set {rate_key}, or leave both out"),
        )),
        (rate, burst) => Limit::new(rate, burst)
            .map(Some)
            .map_err(|error| invalid(&format!("{KEY}.{rate_key}"), &format!("{rate} is not possible: {error}"))),
    }
}

fn number(fields: &Map<String, Value>, key: &str) -> Result<u64, Failure> {
    match fields.get(key) {
        None | Some(Value::Null) => Ok(0),
        Some(value) => value.as_u64().ok_or_else(|| {
            invalid(&format!("{KEY}.{key}"), &format!("{value} is not a whole number of at least 0, without quotes"))
        }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Code;
    use serde_json::json;

    fn bandwidth(value: Value) -> Result<Option<Bandwidth>, Failure> {
        let conf = json!({"cniVersion": "1.0.0", "name": "husk", "runtimeConfig": {"bandwidth": value}});
        NetConf::parse(conf.to_string().as_bytes()).and_then(|conf| conf.bandwidth())
    }

    #[test]
    fn both_directions_are_read() {
        let got = bandwidth(json!({"ingressRate": 1_000_000, "ingressBurst": 8_000_000, "egressRate": 2_000_000}));
        let got = got.unwrap().unwrap();
        let (ingress, egress) = (got.ingress.unwrap(), got.egress.unwrap());
        assert_eq!((ingress.rate(), ingress.burst_bytes()), (1_000_000, 1_000_000));
        assert_eq!(egress.rate(), 2_000_000);
    }

    #[test]
    fn what_a_kubelet_and_containerd_send_has_a_burst_of_ours() {
        for burst in [i64::from(i32::MAX), i64::from(u32::MAX)] {
            let got = bandwidth(json!({"ingressRate": 100_000_000, "ingressBurst": burst, "egressRate": 0}));
            let got = got.unwrap().unwrap();
            assert_eq!(got.ingress.unwrap().burst_bytes(), 1_250_000);
            assert_eq!(got.egress, None);
        }
    }

    #[test]
    fn containerd_writes_its_keys_differently() {
        let limits = json!({"IngressRate": 20_000_000, "IngressBurst": u32::MAX, "EgressRate": 0, "EgressBurst": 0});
        assert_eq!(bandwidth(limits).unwrap().unwrap().ingress.unwrap().rate(), 20_000_000);
        let twice = bandwidth(json!({"IngressRate": 20_000_000, "ingressRate": 10_000_000})).unwrap_err();
        assert_eq!(twice.code, Code::UnsupportedField);
        assert!(twice.message.contains("bandwidth.IngressRate = 20000000"), "{twice}");
    }

    #[test]
    fn nothing_is_no_limit() {
        for none in [json!(null), json!({}), json!({"ingressRate": 0, "ingressBurst": 0, "egressRate": null})] {
            assert_eq!(bandwidth(none.clone()).unwrap(), None, "{none}");
        }
    }

    #[test]
    fn what_is_wrong_is_named_with_its_value() {
        for (value, code, parts) in [
            (json!({"ingressRate": 10}), Code::InvalidConfig, ["runtimeConfig.bandwidth.ingressRate", "10 is"]),
            (json!({"egressRate": -1}), Code::InvalidConfig, ["runtimeConfig.bandwidth.egressRate", "-1"]),
            (json!({"egressRate": "1M"}), Code::InvalidConfig, ["runtimeConfig.bandwidth.egressRate", "\"1M\""]),
            (
                json!({"egressRate": 1e30}),
                Code::InvalidConfig,
                ["runtimeConfig.bandwidth.egressRate", "is not a whole number"],
            ),
            (json!({"egressBurst": 9}), Code::InvalidConfig, ["runtimeConfig.bandwidth.egressBurst", "9 is"]),
            (json!([]), Code::InvalidConfig, ["runtimeConfig.bandwidth", "[]"]),
            (
                json!({"unshapedSubnets": ["10.0.0.0/8"]}),
                Code::UnsupportedField,
                ["runtimeConfig.bandwidth.unshapedSubnets", "10.0.0.0/8"],
            ),
        ] {
            let failure = bandwidth(value.clone()).unwrap_err();
            assert_eq!(failure.code, code, "{value}");
            for part in parts {
                assert!(failure.message.contains(part), "{value}: {failure}");
            }
        }
    }
}
