-- Move one dead letter back to the stream it came from, or leave everything as it is.
--
-- KEYS  dead-letter stream, original stream
-- ARGV  id of the letter, prefix of the fields that were added to it, field that keeps the
--       original id
-- Returns the new entry's id, or nil when the letter is not there (any more): asking again after a
-- lost reply moves nothing twice.

local rows = redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[1])
if #rows == 0 then
  return false
end
local prefix, trace = ARGV[2], ARGV[3]
local fields, original, traced = {}, '', false
for index = 1, #rows[1][2], 2 do
  local name, value = rows[1][2][index], rows[1][2][index + 1]
  if name == prefix .. 'id' then
    original = value
  end
  if string.sub(name, 1, string.len(prefix)) ~= prefix then
    fields[#fields + 1] = name
    fields[#fields + 1] = value
    traced = traced or name == trace
  end
end
-- A letter that died again keeps the id it had the first time.
if not traced then
  fields[#fields + 1] = trace
  fields[#fields + 1] = original
end
-- The append is what can fail, so nothing is deleted before it.
local id = redis.call('XADD', KEYS[2], '*', unpack(fields))
redis.call('XDEL', KEYS[1], ARGV[1])
return id
