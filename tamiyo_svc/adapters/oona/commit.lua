-- One decision, all of it or nothing: check the run's version, check that the entry is still ours to
-- answer, append every output, store the run state, acknowledge.
--
-- KEYS  streams and the run-state key, addressed by their index
-- ARGV  group,
--       state key index (0: no state), expected version, new state, state ttl in ms,
--       number of entries to acknowledge, then for each: stream key index, entry id
--         (the first is the entry being answered and must still be pending),
--       number of outputs, then for each: stream key index, approximate length limit (0: none),
--         expiry in ms (0: none), number of fields and values, the fields and values
-- Returns {status} or {'OK', output ids...}
--
-- Redis does not undo what a failed script wrote. So everything that can fail runs before the
-- acknowledgement, and the outputs of a failed attempt are deleted again.

local position = 0
local function take()
  position = position + 1
  return ARGV[position]
end

local group = take()
local state_index = tonumber(take())
local expected_version = take()
local state = take()
local state_ttl_ms = tonumber(take())

if state_index > 0 then
  local version = redis.call('HGET', KEYS[state_index], 'version') or '0'
  if version ~= expected_version then
    return {'CONFLICT'}
  end
end

local acks = {}
for index = 1, tonumber(take()) do
  acks[index] = {KEYS[tonumber(take())], take()}
end
if #acks > 0 then
  local pending = redis.pcall('XPENDING', acks[1][1], group, acks[1][2], acks[1][2], 1)
  if pending.err then
    if string.find(pending.err, 'NOGROUP', 1, true) then
      return {'DUPLICATE'}
    end
    return redis.error_reply(pending.err)
  end
  if #pending == 0 then
    return {'DUPLICATE'}
  end
end

local written = {}
local reply = {'OK'}
local function undo(err)
  for _, entry in ipairs(written) do
    redis.call('XDEL', entry[1], entry[2])
  end
  return redis.error_reply(err)
end

for _ = 1, tonumber(take()) do
  local key = KEYS[tonumber(take())]
  local limit = take()
  local expiry_ms = tonumber(take())
  local fields = {}
  for index = 1, tonumber(take()) do
    fields[index] = take()
  end
  local id
  if limit == '0' then
    id = redis.pcall('XADD', key, '*', unpack(fields))
  else
    id = redis.pcall('XADD', key, 'MAXLEN', '~', limit, '*', unpack(fields))
  end
  if type(id) == 'table' and id.err then
    return undo(id.err)
  end
  written[#written + 1] = {key, id}
  reply[#reply + 1] = id
  if expiry_ms > 0 then
    redis.call('PEXPIRE', key, expiry_ms)
  end
end

if state_index > 0 then
  local stored = redis.pcall('HSET', KEYS[state_index], 'version', expected_version + 1, 'state', state)
  if type(stored) == 'table' and stored.err then
    return undo(stored.err)
  end
  redis.call('PEXPIRE', KEYS[state_index], state_ttl_ms)
end
for _, ack in ipairs(acks) do
  redis.call('XACK', ack[1], group, ack[2])
end
return reply
